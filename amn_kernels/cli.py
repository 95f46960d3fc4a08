"""The command line. `info` needs torch alone, the other subcommands the `train` extra."""

import importlib.util
import sys
from collections.abc import Sequence

TRAIN_EXTRA = ("jinja2", "matplotlib", "rich", "safetensors", "tyro")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code: 0, 1 for an audit that failed, 2 for wrong use or input, 130 on Ctrl-C.

    arguments: those after the program's name; default: the process's own.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["info"]:
        from amn_kernels import backends

        print(backends.info())
        return 0
    missing = [name for name in TRAIN_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(
            f"this needs {', '.join(missing)}: in a checkout, pip install --no-build-isolation '.[train]' "
            "(only `info` works without)"
        )

    from amn_kernels.train import commands

    try:
        return commands.run(arguments)
    except (ValueError, NotImplementedError, FloatingPointError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"amn-kernels: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
