"""`python -m tests.mutations [--only LANGUAGE] [--layers simt,...] [--named TEXT] [--missing]`: who notices what.

What a layer says replaces its cell in docs/mutations.md; the others stay. Each layer must first find nothing in the
tree as it is. Exit status 1 if an error is noticed by none of its layers.
"""

import argparse
import sys

from . import table
from .copies import Copy
from .languages import LANGUAGES, ROOT
from .layers import LAYERS, record


def main() -> int:
    """1 if an error is noticed by none of its layers."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", choices=LANGUAGES, help="errors in files of one kind")
    parser.add_argument("--layers", default=",".join(LAYERS), help="those to run, of %(default)s")
    parser.add_argument("--named", default="", help="errors with this in their name")
    parser.add_argument("--missing", action="store_true", help="only cells that the document does not have yet")
    arguments = parser.parse_args()
    wanted = arguments.layers.split(",")
    if unknown := set(wanted) - set(LAYERS):
        parser.error(f"unknown layers: {', '.join(sorted(unknown))}")

    found, selected = table.read(), []
    for name, language in LANGUAGES.items():
        for mutation in language.mutations if arguments.only in (None, name) else ():
            known = found.get((language.path(mutation), mutation.name), {}) if arguments.missing else {}
            layers = [layer for layer in language.layers_of(mutation) if layer in wanted and layer not in known]
            if layers and arguments.named in mutation.name:
                selected.append((language, mutation, layers))
    copy = Copy(ROOT / "build" / "mutations")
    if any(layer.startswith("simt") for _, _, layers in selected for layer in layers):
        record(copy.path)
    for layer in LAYERS:
        mutations = [mutation for _, mutation, layers in selected if layer in layers]
        if mutations and (verdict := LAYERS[layer](copy.path, mutations)):
            raise RuntimeError(f"{layer} is not green without any error: {verdict}")
    copy.keep()

    for language, mutation, layers in selected:
        copy.put_back()
        path = copy.path / language.path(mutation)
        path.write_text(mutation.put_into(path.read_text()))
        said = found.setdefault((language.path(mutation), mutation.name), {})
        for layer in layers:
            said[layer] = LAYERS[layer](copy.path, [mutation])
        print(language.path(mutation), mutation.name, said, sep="; ", flush=True)
        table.write(found)

    unnoticed = table.unnoticed(found)
    if unnoticed:
        print("noticed by no layer:", ", ".join(unnoticed))
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
