"""Generated cases, the same in every run (10,000 of them are `make fuzz`), and hostile files by hand."""

import io
import os
import pickle
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import KINDS, files, loss, run
from fuzz.files import Canary, Claim, zipped

from amn_kernels import functional
from amn_kernels.data import npz
from amn_kernels.data.npz import open_npz
from amn_kernels.data.windows import load_windows
from amn_kernels.train.checkpoints import load_checkpoint, save_checkpoint

CASES = {
    "loss": 300,
    "options": 200,
    "tensors": 150,
    "queue": 50,
    "npz": 200,
    "npz claims": 150,
    "checkpoint": 150,
    "run": 100,
}


@pytest.mark.parametrize("kind", KINDS)
def test_generated(kind):
    if kind == "loss" and not loss.contenders():
        pytest.skip("no backend is there to be compared with the reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about the odd tensors that it is given
        run(kind, CASES[kind])


def drawn(monkeypatch, count):
    """So many cases of the loss, unchecked."""
    cases = []
    with monkeypatch.context() as patch:
        patch.setitem(KINDS, "loss", (KINDS["loss"][0], cases.append))
        run("loss", count)
    return cases


def test_most_cases_of_the_loss_have_a_gradient_and_some_are_large(monkeypatch):
    cases = drawn(monkeypatch, 1000)
    of_pred = sum("pred" in case.gradients for case in cases)
    assert 0.7 <= of_pred / len(cases) <= 0.9
    large = [case for case in cases if case.shape[0] >= 1000]
    assert any("pred" in case.gradients for case in large)
    kinds = Counter(case.options["weighting"] for case in cases)
    assert kinds.keys() == {"fixed", "gradient", "value"}
    assert 0.3 <= 1 - kinds["fixed"] / len(cases) <= 0.5


def noticed(cases):
    """In how many of them a backend disagrees."""
    count = 0
    for case in cases:
        try:
            loss.check(case)
        except AssertionError:
            count += 1
    return count


@pytest.mark.skipif(not loss.contenders(), reason="no backend is there to be compared with the reference")
@pytest.mark.filterwarnings("ignore")  # of PyTorch about the odd tensors that it is given
def test_the_fuzz_notices_a_wrong_gradient(monkeypatch):
    """By a tenth, of what a backend returns: the sizes that rounding is relative to must not cover it."""
    cases = [case for case in drawn(monkeypatch, 60) if "pred" in case.gradients and case.shape[0] < 1000]
    evaluate = loss.evaluate

    def off(case, given, backend, **options):
        result = evaluate(case, given, backend, **options)
        if backend is not None and result is not None:
            result.gradients["pred"] = 1.1 * result.gradients["pred"]
        return result

    monkeypatch.setattr(loss, "evaluate", off)
    # Not those that are compared only in part (`fuzz.loss.notes`), and gradients of zero: a half to three quarters.
    assert noticed(cases) > len(cases) / 3


@pytest.mark.skipif(not loss.contenders(), reason="no backend is there to be compared with the reference")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["weights", "state"])
def test_the_fuzz_notices_wrong_balanced_weights(monkeypatch, what):
    cases = [case for case in drawn(monkeypatch, 100) if case.options["weighting"] != "fixed"]
    fused = functional.evaluate

    def off(*arguments, weighting=None, **options):
        total, stats = fused(*arguments, weighting=weighting, **options)
        if weighting is not None and what == "weights":
            stats.weights = 1.001 * stats.weights
        elif weighting is not None:
            weighting.updates.add_(1)
        return total, stats

    monkeypatch.setattr(loss.functional, "evaluate", off)
    assert cases
    assert noticed(cases) == len(cases)


def test_claims_notice_a_loader_of_other_rows(monkeypatch):
    """Enough of them are right in everything for a wrong array to be seen, of each order and type."""
    read, right = npz._read_member, Counter()

    def count(path, member):
        found = read(path, member)
        if member == "vectors.npy":
            right["F" if found.flags.fnc else "C", found.dtype.str] += 1
        return found

    monkeypatch.setattr(npz, "_read_member", count)
    run("npz claims", 200)
    assert sum(right.values()) >= 100
    assert {order for order, _ in right} == {"C", "F"}
    assert {"<f4", ">f4", "<f8", "<f2"} <= {dtype for _, dtype in right}
    monkeypatch.setattr(npz, "_read_member", lambda *where: np.roll(read(*where), 1))
    with pytest.raises(AssertionError, match="not the one that numpy reads"):
        run("npz claims", 200)


def hostile_npz(path, canary):
    """Files whose array of vectors is a pickle that makes a file, as numpy writes it and hidden under other types."""
    objects = np.array([[canary]], dtype=object)
    for save in (np.savez, np.savez_compressed):
        save(path, vectors=objects, article=np.zeros(1, int))
        yield path.read_bytes()
    payload = pickle.dumps(objects)
    yield payload
    for descr in ("'|O'", "[('a', '|O')]", f"'|V{len(payload)}'"):
        header = files.HEADER.format(descr=descr, order="False", shape="(1, 1)")
        yield zipped({"vectors.npy": files.npy(header, payload), "article.npy": files.good_member("article")})
    yield zipped({"vectors.npy": payload, "article.npy": payload})


def test_nothing_in_an_npz_file_is_executed(tmp_path):
    made, path = tmp_path / "made", tmp_path / "hostile.npz"
    for data in list(hostile_npz(path, Canary(made))):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"hostile\.npz"):
            load_windows(path)
        assert not made.exists()
    next(hostile_npz(path, Canary(made)))
    np.load(path, allow_pickle=True)["vectors"]  # the canary does sing
    assert made.exists()


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    made = tmp_path / "made"
    torch.save(Canary(made), saved := io.BytesIO())
    for payload in (pickle.dumps(Canary(made)), saved.getvalue()):
        for name in ("tensors.safetensors", "state.json", "SHA256SUMS"):
            path = save_checkpoint(tmp_path / name, 1, {"step": 1, "weights": torch.ones(3)}, keep=1)
            for checked in (False, True):  # with the right checksums too
                contents = {file.name: file.read_bytes() for file in path.iterdir()} | {name: payload}
                if checked and name != "SHA256SUMS":
                    contents["SHA256SUMS"] = files.sums(contents)
                for each, data in contents.items():
                    (path / each).write_bytes(data)
                with pytest.raises(ValueError, match="damaged"):
                    load_checkpoint(path)
                assert not made.exists()
    pickle.loads(pickle.dumps(Canary(made)))
    assert made.exists()


STATES = (
    "[" * 100_000,
    "3",
    '{"a": 1}',
    '{"__items__": 3}',
    '{"__items__": [[[1], 2]]}',
    '{"__tensor__": "none"}',
    "\xff",
)


@pytest.mark.parametrize("content", STATES, ids=range(len(STATES)))
def test_states_that_are_none(tmp_path, content):
    """JSON that nests too deep, is no state, or names what is not there; with the right checksums."""
    path = save_checkpoint(tmp_path, 1, {"step": 1, "weights": torch.ones(3)}, keep=1)
    contents = {
        "tensors.safetensors": (path / "tensors.safetensors").read_bytes(),
        "state.json": content.encode("latin1"),
    }
    (path / "state.json").write_bytes(contents["state.json"])
    (path / "SHA256SUMS").write_bytes(files.sums(contents))
    with pytest.raises(ValueError, match=r"state\.json: damaged"):
        load_checkpoint(path)


MEMORY = """
from pathlib import Path
from amn_kernels.data.npz import open_npz
def resident(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
for path in Path.cwd().glob("*.npz"):
    try:
        open_npz(path, ["vectors", "article"])
    except ValueError as error:
        print(error)
    else:
        print("no error:", path)
print(resident("VmHWM") - before)
more = bytearray(128 << 20)
more[::4096] = b"1" * len(more[::4096])
print(resident("VmHWM") - before)
"""


def bombs():
    """Small files that promise much: zeros that compress a thousandfold, and shapes that nothing is behind."""
    zeros = bytes(1 << 20)
    for name, method, mebibytes in (("deflate", zipfile.ZIP_DEFLATED, 300), ("bzip2", zipfile.ZIP_BZIP2, 70)):
        header = files.HEADER.format(descr="'<f4'", order="False", shape=f"({mebibytes << 18}, 1)")
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method, compresslevel=1) as archive:
            with archive.open("vectors.npy", "w") as member:
                member.write(files.npy(header, b""))
                for _ in range(mebibytes):
                    member.write(zeros)
            archive.writestr("article.npy", files.good_member("article"))
        yield name, file.getvalue()
    for shape in ("(1000000000, 5)", "(1000000000000, 5)", "(4611686018427387904, 4)"):
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            claim = Claim(files.HEADER.format(descr="'<f4'", order="False", shape=shape), method, (1, 0), None, 0)
            yield f"{shape} {method}", claim.data()
    long_header = Claim("{'descr': '<f4', " + " " * 60_000 + "}", zipfile.ZIP_DEFLATED, (2, 0), (1 << 32) - 1, 0)
    yield "header", long_header.data()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_memory_is_bounded(tmp_path, run_python):
    """A file can't make the loader take more than it has to: no more than 64 MiB here, of up to 80 EB promised."""
    count = 0
    for name, data in bombs():
        assert len(data) < 2 << 20
        (tmp_path / f"{name}.npz").write_bytes(data)
        count += 1
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        process = run_python(MEMORY)
    finally:
        os.chdir(before)
    assert process.returncode == 0, process.stderr
    *errors, peak, with_128_more = process.stdout.splitlines()
    assert len(errors) == count
    assert not any("no error" in error for error in errors)
    assert int(peak) < 64 << 20
    assert int(with_128_more) > 120 << 20  # the measurement measures


def test_a_member_is_read_within_its_own_bytes(tmp_path):
    """A stored array that claims more rows than it has must not be filled from the member behind it."""
    path = tmp_path / "data.npz"
    header = files.HEADER.format(descr="'<f4'", order="False", shape="(41, 5)")
    members = {"vectors.npy": files.npy(header, files.arrays()["vectors"].tobytes())}
    path.write_bytes(zipped({**members, "article.npy": files.good_member("article")}))
    with pytest.raises(ValueError, match=r"key 'vectors' can't be read .*float32 \[41, 5\], it has 800 bytes"):
        open_npz(path, ("vectors", "article"))
