"""`--config FILE`: options from a TOML file, which flags override."""

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path

FLAG = "--config"


def expand_config(arguments: Sequence[str], options: type) -> list[str]:
    """The arguments with ``--config FILE`` replaced by what the file says, as flags; flags that are given win.

    Args:
        arguments: Of a subcommand, after its name.
        options: The dataclass whose fields are the options.

    Raises:
        ValueError: The file can't be read, or has a key that is no option or a value that is none; with a suggestion.
    """
    arguments = list(arguments)
    given = [argument.split("=", 1)[0] for argument in arguments]
    if FLAG not in given:
        return arguments
    place = given.index(FLAG)
    if "=" in arguments[place]:
        path, rest = Path(arguments[place].split("=", 1)[1]), arguments[:place] + arguments[place + 1 :]
    elif place + 1 < len(arguments):
        path, rest = Path(arguments[place + 1]), arguments[:place] + arguments[place + 2 :]
    else:
        raise ValueError(f"{FLAG} needs a file")
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: can't be read as TOML ({error})") from error
    names = [field.name for field in dataclasses.fields(options)]
    flags: list[str] = []
    for name, value in values.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise ValueError(f"{path}: unknown option {name!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        if isinstance(value, (dict, list)):
            raise ValueError(f"{path}: {name} must be one value, got {value!r}")
        flag = name.replace("_", "-")
        if {f"--{flag}", f"--no-{flag}", f"--{name}"} & set(given):
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags + rest
