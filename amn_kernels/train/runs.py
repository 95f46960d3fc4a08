"""The files of a run, each written atomically.

config.json, history.jsonl, best.safetensors and last.safetensors (the model's weights with a probe of what it makes of
a few contexts), and the folder checkpoints/ of `amn_kernels.train.checkpoints`, from which a training goes on.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from amn_kernels.data import Windows
from amn_kernels.train.checkpoints import check_probe, probe_tensors
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.logs import TENSORBOARD

CONFIG, HISTORY, BEST, LAST = "config.json", "history.jsonl", "best.safetensors", "last.safetensors"
CHECKPOINTS, GONE = "checkpoints", ".checkpoints.gone"


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that at every moment, a crash included, `path` holds the old content or the new one whole."""
    data = content.encode() if isinstance(content, str) else content
    # In the same folder, because a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the owner alone; a run's files get the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[list]:
    """Holds Ctrl-C back until the block is done; yields a list that is empty until there was one."""
    # Only the main thread may set handlers; and where Ctrl-C is ignored, as in a background job, it stays so.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield []
        return
    received = []
    previous = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt


def prepare_folder(out: Path, overwrite: bool, resume: bool = False, files: Iterable[str] = ()) -> None:
    """Makes the folder. FileExistsError if it isn't empty and `overwrite` is off; else an earlier run's files go.

    files: more that an earlier run may have left, to go too.
    resume: a run in it that was killed before its first checkpoint goes too, as it has nothing to go on from. Killed at
    any moment, this leaves nothing that `resume` would go on from.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, --out needs a folder")
    out.mkdir(parents=True, exist_ok=True)
    started = resume and (out / CONFIG).is_file() and (not (out / HISTORY).is_file() or len(load_history(out)) < 2)
    if set(out.iterdir()) > set(_litter(out)) and not (overwrite or started):
        raise FileExistsError(f"{out} isn't empty: choose another --out, or --overwrite to replace the run in it")
    remove_litter(out)
    # First and at once, out of sight: an old checkpoint beside a new config would pass for the new run's.
    with contextlib.suppress(FileNotFoundError):
        os.replace(out / CHECKPOINTS, out / GONE)
    shutil.rmtree(out / TENSORBOARD, ignore_errors=True)
    # The configuration last: while it is there, `resume` knows a run without checkpoints for one to start again.
    for name in (*files, HISTORY, BEST, LAST, CONFIG):
        (out / name).unlink(missing_ok=True)
    remove_litter(out)


def remove_litter(out: Path) -> None:
    """Removes what a killed process left in a run's folder: unfinished writes, and checkpoints on their way out."""
    for path in _litter(out):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _litter(out: Path) -> list[Path]:
    # After the dot are the 8 random characters of mkstemp; an editor's files have fewer.
    writes = (f".{name}.{'?' * 8}" for name in (CONFIG, HISTORY, BEST, LAST))
    return [path for pattern in (GONE, *writes) for path in out.glob(pattern)]


def save_config(out: Path, config: TrainConfig, windows: Windows) -> None:
    """config.json: every option, and the data's D (`dim`) and T (`context`), to build the model of, and fingerprint."""
    values = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()
    }
    values["data"] = None if config.data is None else str(config.data.resolve())
    of_data = {name: getattr(windows, name) for name in ("dim", "context", "fingerprint")}
    write_atomically(out / CONFIG, json.dumps(values | of_data, indent=2) + "\n")


def save_epoch(out: Path, model: nn.Module, probe: Tensor, history: list[dict], is_best: bool) -> None:
    """Writes the weights with a probe on the contexts [B, T, D], and the history, one JSON object a line and epoch."""
    # Copies, because safetensors takes no tensors that share memory, as tied weights do.
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    content = save(weights | probe_tensors(model, probe))
    write_atomically(out / LAST, content)
    if is_best:
        write_atomically(out / BEST, content)
    rows = without_nan(history)
    write_atomically(out / HISTORY, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def without_nan(content: object) -> object:
    """The same nest of dictionaries and lists with None, which JSON has, for NaN and infinity, which it hasn't."""
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class Run(NamedTuple):
    """A trained run, as it is read from its folder."""

    config: TrainConfig
    dim: int
    context: int
    fingerprint: str | None
    """Of the windows that it was trained on; None where the folder does not say."""
    model: nn.Module
    """The best one, in eval mode."""


def load_run(out: Path) -> Run:
    """The run in a folder; FileNotFoundError or ValueError naming the file at fault."""
    for name in (CONFIG, BEST):
        if not (out / name).is_file():
            raise FileNotFoundError(f"{out / name}: no such file, {out} holds no trained run")
    try:
        tensors = load((out / BEST).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{out / BEST}: damaged ({error})") from error
    try:
        values = json.loads((out / CONFIG).read_text())
        dim, context, fingerprint = values.pop("dim"), values["context"], values.pop("fingerprint", None)
        values["data"] = None if values["data"] is None else Path(values["data"])
        config = TrainConfig(**values | {"out": Path(values["out"])})
        # A model of a damaged `dim` could take any amount of memory.
        probed = tensors["probe.context"].shape[-1:] if "probe.context" in tensors else ()
        model = config.make_model(dim) if probed == (dim,) else None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{out / CONFIG}: not a run's configuration ({error})") from error
    if model is None:
        raise ValueError(f"{out / BEST}: damaged, or not of this model (it has no probe of dimension {dim})")
    check_probe(out / BEST, model, tensors)
    return Run(config, dim, context, fingerprint, model.eval())


def load_history(out: Path) -> list[dict]:
    """The epochs of history.jsonl, first to last; ValueError naming the line that is damaged."""
    epochs = []
    for number, line in enumerate((out / HISTORY).read_bytes().splitlines(), start=1):
        try:
            epochs.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{out / HISTORY}, line {number}: damaged ({error})") from error
    return epochs
