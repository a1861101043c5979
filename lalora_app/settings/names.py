"""Meanings of names in the run config: paths, hub ids, prefixes."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from lalora_app.settings.errors import ConfigError

NONE = "none"  # the value of a key that is switched off
AUTO = "auto"  # the value of a key that the app chooses
CLASS_MEANS = "class-means"  # the value of model.head

FILE_KINDS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
_PACKED = tuple(f"{kind}.gz" for kind in FILE_KINDS if kind != ".parquet")  # parquet packs itself

TIMM = "timm:"  # prefix of a timm architecture or of a folder with timm weights


_NEAR = 0.6  # least similarity of a suggested name, from 0 to 1; difflib's own default


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `` did you mean "..."?`` for the known name nearest to a word; empty if none is near.

    Near is a similar spelling, a beginning, or a key without its table, such as ``rank`` for
    ``lora.rank``; large and small letters are alike.
    """
    whole = {name.lower(): name for name in known}
    parts = {lower.rpartition(".")[2]: name for lower, name in reversed(whole.items())}
    for names in (whole, parts):
        near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=_NEAR)
        near += [name for name in names if word and name.startswith(word.lower())]
        if near:
            return f'; did you mean "{names[near[0]]}"?'
    return ""


def full_path(text: str) -> Path:
    """Return a config value as a path, with ``~`` replaced by the home directory.

    Raises:
        ConfigError: if the path starts with ``~name`` and there is no user of this name.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{text!r} must start with the home folder of an existing user"
        ) from error


def has_file_kind(name: str) -> bool:
    """Tell whether a name ends as a data file does, in small or large letters."""
    return name.lower().endswith(FILE_KINDS + _PACKED)


def is_local(name: str) -> bool:
    """Tell whether a name is a local path; all other names are ids of a model or data hub."""
    return name.startswith(("/", "~", "."))
