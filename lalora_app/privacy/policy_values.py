"""Values of a site's policy: read by type and law from a TOML table or a node config."""

from collections.abc import Mapping

from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import as_float


class PolicyError(RuntimeError):
    """The client's policy does not allow the server's request; nothing was spent."""


def number(values: Mapping[str, object], key: str, default: float, source: str) -> float:
    """Return a number; ``source`` names the file in the error.

    Raises:
        ConfigError: if the value is no number.
    """
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{source} {key}={value!r} must be a number")
    return as_float(value)


def flag(values: Mapping[str, object], key: str, default: bool, source: str) -> bool:
    """Return a truth value.

    Raises:
        ConfigError: if the value is none.
    """
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{source} {key}={value!r} must be true or false")
    return value


def integer(values: Mapping[str, object], key: str, least: int, source: str) -> int | None:
    """Return an integer of at least ``least``; None if the key is missing.

    Raises:
        ConfigError: if the value is no such integer.
    """
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{source} {key}={value!r} must be an integer of at least {least}")
    return value


def names(values: Mapping[str, object], key: str, source: str) -> frozenset[str] | None:
    """Return a list of names as a set; None if the key is missing.

    Raises:
        ConfigError: if the value is no list of texts, or an empty one.
    """
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{source} {key}={value!r} must be a list of at least one name")
    return frozenset(value)


def require_known(values: Mapping[str, object], known: tuple[str, ...], source: str) -> None:
    """Check that a table has no other keys than ``known``.

    Raises:
        ConfigError: if it has.
    """
    for key in sorted(set(values) - set(known)):
        raise ConfigError(f"{source} {key} must be one of {', '.join(known)}")
