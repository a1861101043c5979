"""Meanings of names in the run config: paths, hub ids, prefixes."""

from pathlib import Path

from lalora_app.settings.errors import ConfigError

NONE = "none"  # the value of a key that is switched off
AUTO = "auto"  # the value of a key that the app chooses

TIMM = "timm:"  # prefix of a timm architecture or of a folder with timm weights


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


def is_local(name: str) -> bool:
    """Tell whether a name is a local path; all other names are ids of a model or data hub."""
    return name.startswith(("/", "~", "."))
