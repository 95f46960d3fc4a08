"""docs/mutations.md: what the layers said, of all errors. What was not run again stays as it is in the document."""

from pathlib import Path

from amn_kernels.train.runs import write_atomically

from .languages import LANGUAGES, ROOT
from .layers import LAYERS

PATH = ROOT / "docs" / "mutations.md"

Found = dict[tuple[str, str], dict[str, str]]
"""By file and error: what each layer that ran noticed, in a word; empty for nothing."""

_NOTHING, _NOT_RUN = "–", "?"

_INTRODUCTION = f"""\
# Errors put into the code, and who notices

Made by `make mutations`. Each error is put into a copy of the tree, alone, and every layer that can see files of its
kind looks for it. What a cell says:

- a word: the layer noticed the error. It saw a wrong *value*, an access *out of bounds*, a *race*, threads that
  disagree at a barrier (*divergence*) or in a shuffle (*mask*), a *spill* of registers, *narrow loads* or low
  *occupancy*, or it failed otherwise (*error*);
- {_NOTHING}: the layer ran and noticed nothing;
- {_NOT_RUN}: the layer has not run on this error;
- empty: the layer can't see errors of this kind.

The layers:

- `simt`: recorded calls of the CUDA kernels on the CPU, where every bit of the results is compared; `simt-asan` looks
  at addresses too, `simt-tsan` at races.
- `ttsem`: tests of the Triton kernels, run on the CPU from the compiler's TTIR; values, addresses and races.
- `cpu tests`: tests of the compiled op, of the weights, and of the algorithm in Python over compiled primitives.
- `kernels-check`: registers, spills, occupancy and width of loads in what is compiled for GPUs, for errors that change
  no value.
"""


def read(path: Path = PATH) -> Found:
    """What the document says; nothing of layers that have not run."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")] if path.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found: Found = {}
    for file, name, *cells in rows[2:]:
        said = dict(zip(rows[0][2:], cells, strict=True))
        found[file.strip("`"), name] = {
            layer: cell.replace(_NOTHING, "") for layer, cell in said.items() if cell not in ("", _NOT_RUN)
        }
    return found


def unnoticed(found: Found) -> list[str]:
    """Names of the errors for which all their layers have run and none noticed anything."""
    return [
        mutation.name
        for language in LANGUAGES.values()
        for mutation in language.mutations
        if (said := found.get((language.path(mutation), mutation.name), {})).keys() == set(language.layers_of(mutation))
        and not any(said.values())
    ]


def write(found: Found, path: Path = PATH) -> None:
    """The document, of the errors that there are now."""
    lines = [_INTRODUCTION, f"| file | error | {' | '.join(LAYERS)} |", "|---|---|" + "---|" * len(LAYERS)]
    for language, mutation in ((x, mutation) for x in LANGUAGES.values() for mutation in x.mutations):
        key = (language.path(mutation), mutation.name)
        said = {layer: word or _NOTHING for layer, word in found.get(key, {}).items()}
        own = language.layers_of(mutation)
        cells = [said.get(layer, _NOT_RUN) if layer in own else "" for layer in LAYERS]
        lines.append(f"| `{key[0]}` | {key[1]} | {' | '.join(cells)} |")
    write_atomically(path, "\n".join(lines) + "\n")
