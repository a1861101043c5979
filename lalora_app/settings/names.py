"""Meanings of names in the run config: paths, hub ids, prefixes."""

from pathlib import Path

from lalora_app.settings.errors import ConfigError

NONE = "none"

TIMM = "timm:"  # before the name of an architecture or folder of timm


def full_path(text: str) -> Path:
    """Return the path of a config value; ConfigError at the home ``~name`` of no user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{text!r} must start with the home of a user") from error


def is_local(name: str) -> bool:
    """Tell whether a name is a path, and not an id of the hub."""
    return name.startswith(("/", "~", "."))
