"""A copy of the tree to put errors into, one at a time."""

import shutil
from pathlib import Path

from .languages import ROOT

PARTS = ("amn_kernels", "python_ref", "csrc", "tests", "bench", "setup.py", "pyproject.toml")


class Copy:
    """The tree at `path`, where what was compiled stays beside it; `put_back` takes an error out again."""

    def __init__(self, folder: Path):
        self.path, self._sound = folder / "tree", folder / "sound"
        if self._sound.exists():
            self.put_back()  # for what was compiled the last time
        for part in PARTS:
            _replace(self.path / part, ROOT / part)
        # As it is installed; else python_ref of the tree itself would be imported.
        _replace(self.path / "amn_kernels" / "reference", ROOT / "python_ref")

    def keep(self) -> None:
        """What there is now is sound, and so is what was compiled of it."""
        _replace(self._sound, self.path)

    def put_back(self) -> None:
        """As it was kept, all times included: builds go by them, and by the path."""
        _replace(self.path, self._sound)


def _replace(target: Path, source: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)
