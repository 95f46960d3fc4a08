"""Checkpoints: all that a training needs to go on as if it had never stopped, as safetensors + JSON.

A checkpoint is a folder ``step-000001234`` with `tensors.safetensors`, `state.json` and their checksums, as sha256sum
writes and checks them. It appears whole, by the rename of a folder whose files are on disk already, so at every moment
the newest one is good, a crash included.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"
_TENSOR, _ITEMS = "__tensor__", "__items__"


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Writes the checkpoint of a step and removes all but the newest `keep`; returns its path.

    Args:
        folder: Of the checkpoints.
        step: Its number; one that is there already is left as it is.
        state: Nested dictionaries and lists of tensors, numbers, strings and None.
        keep: How many to keep, at least 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}"
    if not path.exists():
        tensors: dict[str, Tensor] = {}
        skeleton = _pack(state, tensors, "")
        temporary = folder / f".{path.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = {TENSORS: save(tensors), STATE: json.dumps(skeleton, allow_nan=True).encode()}
        for name, data in files.items():
            _write(temporary / name, data)
        _write(temporary / SUMS, _sums(files))
        _sync(temporary)
        os.replace(temporary, path)
        _sync(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        # First out of sight, so that what is half removed can't pass for a checkpoint.
        gone = folder / f".{old.name}.gone"
        with contextlib.suppress(FileNotFoundError):
            os.replace(old, gone)
    for rest in folder.glob(".step-*"):
        shutil.rmtree(rest, ignore_errors=True)
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last step, or None."""
    return max(folder.glob("step-*"), default=None)


def load_checkpoint(path: Path) -> dict:
    """The state that was saved; ValueError naming the file that is damaged."""
    files = {name: _read(path / name) for name in (TENSORS, STATE, SUMS)}
    sums = files.pop(SUMS)
    if sums != _sums(files):
        damaged = next((name for name in files if _sums({name: files[name]}) not in sums), SUMS)
        raise ValueError(f"{path / damaged}: damaged (its checksum is not the one in {SUMS})")
    try:
        tensors = load(files[TENSORS])
    except SafetensorError as error:
        raise ValueError(f"{path / TENSORS}: damaged ({error})") from error
    try:
        state = _unpack(json.loads(files[STATE]), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / STATE}: damaged ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path / STATE}: damaged (it holds no state, but {type(state).__name__})")
    return state


def probe_tensors(model: nn.Module, contexts: Tensor) -> dict[str, Tensor]:
    """A few contexts [B, T, D] and what the model makes of them, to be saved with its weights."""
    return {"probe.context": contexts.cpu().contiguous(), "probe.prediction": _predict(model, contexts)}


def check_probe(where: Path | str, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights without the probe; loads them and recomputes the probe.

    Raises ValueError if weights don't fit, or fit by name and shape only: another class with the same parameters makes
    something else of the same contexts. Predictions may differ by 1e-3 of their norm, which another machine's rounding
    stays far below. Also if what was saved isn't finite.
    """
    weights = dict(tensors)
    try:
        contexts, wanted = weights.pop("probe.context"), weights.pop("probe.prediction")
        model.load_state_dict(weights)
        found = _predict(model, contexts)
        off = ((found - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: damaged, or not of this model ({error})") from error
    if not wanted.isfinite().all():
        raise ValueError(f"{where}: damaged, or of a training that diverged: its saved predictions aren't finite")
    if not off <= 1e-3:
        raise ValueError(
            f"{where}: the weights fit {type(model).__name__} in name and shape, but its predictions are off by "
            f"{off:.0%} from those that were saved with them: they belong to another architecture"
        )
    return weights


@torch.no_grad()
def _predict(model: nn.Module, contexts: Tensor) -> Tensor:
    training = model.training
    model.eval()
    device = next(model.parameters(), torch.empty(0)).device
    # cuDNN computes LSTM and GRU in TF32 otherwise, which rounds a thousand times as much as another machine's float32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        prediction = model(contexts.to(device)).float().cpu()
    model.train(training)
    return prediction


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def _sums(files: dict[str, bytes]) -> bytes:
    """A line for each of the files, as sha256sum has it."""
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()).encode()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """`value` as JSON has it; its tensors go to `tensors`, under their path in it."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):  # keys may be numbers, which JSON does not have
        return {_ITEMS: [[key, _pack(item, tensors, f"{name}.{key}".lstrip("."))] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(item, tensors, f"{name}.{i}".lstrip(".")) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} can't be saved: {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    return {key: _unpack(item, tensors) for key, item in value[_ITEMS]}
