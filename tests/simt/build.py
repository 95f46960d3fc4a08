"""Builds the CUDA kernels for the CPU: a library for Python, and programs under the sanitizers. Only what changed."""

import enum
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "simt"
SCHEDULER = [HERE / f"{name}.cpp" for name in ("simt", "collectives", "fibers")]

# Strict aliasing is not what CUDA code is written for: a pack of floats is moved as four integers.
_FLAGS = (f"-std=c++20 -O1 -g -fPIC -fno-strict-aliasing -DAMN_SIMT -I{HERE} -I{KERNELS}").split()


class Build(enum.Enum):
    """The builds: flags for all sources, and those of the instrumented ones."""

    PLAIN = (), ()
    ASAN = (
        ("-DSIMT_ASAN",),
        (
            "-fsanitize=address,alignment,bounds,signed-integer-overflow",
            "-fno-sanitize-recover=all",
        ),
    )
    TSAN = ("-DSIMT_TSAN",), ("-fsanitize=thread",)
    # Accesses call the functions of count.cpp, not ThreadSanitizer's.
    COUNT = (), ("-fsanitize=thread",)

    @property
    def define(self) -> tuple[str, ...]:
        return self.value[0]

    @property
    def sanitize(self) -> tuple[str, ...]:
        return self.value[1]


def kernels() -> list[Path]:
    """The sources of all kernels."""
    return sorted(KERNELS.glob("*.cu"))


def library(build: Build = Build.PLAIN) -> Path:
    """The kernels as a shared library, plain or counting."""
    counting = [HERE / "count.cpp"] if build == Build.COUNT else []
    objects = _objects(build, [*kernels(), HERE / "launchers.cpp", *counting])
    # Its own functions before those of a library of the same ones that somebody has loaded for all.
    return _link(Build.PLAIN, BUILD / build.name.lower() / "libsimt.so", objects, ["-shared", "-Wl,-Bsymbolic"])


def program(name: str, build: Build) -> Path:
    """The program NAME.cu or NAME.cpp of this folder; `replay` with all kernels."""
    (source,) = (path for suffix in (".cu", ".cpp") if (path := HERE / f"{name}{suffix}").exists())
    sources = [source, *([*kernels(), HERE / "launchers.cpp"] if name == "replay" else [])]
    return _link(build, BUILD / build.name.lower() / name, _objects(build, sources), [])


def run(program: Path, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs a program with the options under which a sanitizer's finding is an exit status and nothing waits."""
    environment = {**os.environ, "TSAN_OPTIONS": "atexit_sleep_ms=0 halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


def _objects(build: Build, sources: list[Path]) -> list[Path]:
    headers = [*HERE.glob("*.h"), *KERNELS.glob("*.h"), *KERNELS.glob("*.cuh"), ROOT / "csrc" / "types.h"]
    newest = max(path.stat().st_mtime for path in [*headers, Path(__file__)])
    folder = BUILD / build.name.lower()
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime <= max(newest, source.stat().st_mtime):
            # The scheduler stays without instrumentation: the sanitizers are told of its switches.
            own = ("-O2",) if source in (*SCHEDULER, HERE / "count.cpp") else build.sanitize
            _gcc(target, [*_FLAGS, *build.define, *own, "-c", "-x", "c++", str(source)])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, [*sources, *SCHEDULER]))


def _link(build: Build, target: Path, objects: list[Path], flags: list[str]) -> Path:
    if not target.exists() or target.stat().st_mtime <= max(path.stat().st_mtime for path in objects):
        _gcc(target, [*build.sanitize, *flags, *map(str, objects)])
    return target


def _gcc(target: Path, arguments: list[str]) -> None:
    partial = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run(["g++", *arguments, "-o", str(partial)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"g++ failed for {target.name}:\n{done.stderr[-4000:]}")
    partial.replace(target)
