"""Read and merge overrides of the run config: TOML files, and key=value pairs."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import TIMM, full_path, has_file_kind, is_local
from lalora_app.settings.run_config import from_tables

_PAIR = r"""([^\s=]+)\s*=\s*("[^"]*"|'[^']*'|\S+)"""
_PATHS = {"model.name", "data.name"}


def absolute(flat: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return flat keys and values, with relative paths of model and data made absolute.

    Args:
        flat: keys and values of a run.
        folder: start of the relative paths, which begin with a dot, end as a data file does, or
            name an existing file or folder there. The run itself works in a folder of its own.
    """
    return {
        key: _absolute(key, value, folder) if key in _PATHS else value
        for key, value in flat.items()
    }


def _absolute(key: str, value: Any, folder: Path) -> Any:
    prefix = TIMM if str(value).startswith(TIMM) else ""
    name = str(value).removeprefix(prefix)
    if not name.strip() or is_local(name) != name.startswith("."):
        return value  # nothing is named, or the path is absolute or starts with ~
    is_file = key == "data.name" and has_file_kind(name)
    relative = is_file or name.startswith(".") or _is_there(folder / name)
    return f"{prefix}{(folder / name).resolve()}" if relative else value


def _is_there(path: Path) -> bool:
    """Tell whether a file or folder exists; a name that no path can have does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_toml(file: Path, name: str) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Args:
        file: path of the TOML file.
        name: name of the file in error messages.

    Raises:
        ConfigError: if the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{name} must be a readable file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} must be TOML, which is UTF-8: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} must be TOML: {error}") from error


def pairs(option: str, text: str) -> dict[str, Any]:
    """Read ``key=value`` pairs that are separated by spaces; each value is written as in TOML.

    Args:
        option: name of the option in error messages.
        text: the pairs.

    Raises:
        ConfigError: if the text is something else.
    """
    lines = [f"{key} = {value}" for key, value in re.findall(_PAIR, text)]
    if rest := re.sub(_PAIR, "", text).strip():
        raise ConfigError(f"{option} {text!r} must be key=value pairs, and {rest!r} is none")
    try:
        return tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{option} {text!r} must be TOML, strings in quotes: {error}") from error


def _read(option: str, text: str) -> dict[str, Any]:
    if not text.endswith(".toml"):
        return absolute(from_tables(pairs(option, text)), Path.cwd())
    file = full_path(text).resolve()
    return absolute(from_tables(read_toml(file, f"{option} {text}")), file.parent)


def merged(overrides: Iterable[str], option: str = "-c") -> dict[str, Any]:
    """Return the flat keys and values of all overrides; a later override replaces an earlier one.

    Args:
        overrides: TOML files or ``key=value`` pairs. A relative path in a file starts at the
            file's folder, and a relative path in a pair at the current folder.
        option: name of the option in error messages.

    Raises:
        ConfigError: if an override cannot be read.
    """
    values: dict[str, Any] = {}
    for text in overrides:
        values |= _read(option, text)
    return values
