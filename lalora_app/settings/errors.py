"""Errors of a run's settings and data."""


class ConfigError(ValueError):
    """A setting is not allowed; the message names the key, the value and the law."""


class DataError(ConfigError):
    """The data cannot be used; ``key`` is the config key that a client's refusal may name."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}{message}")
        self.key, self._message = key, message

    def __reduce__(self) -> tuple[type["DataError"], tuple[str, str]]:
        """Return the arguments of this error, for another process."""
        return type(self), (self.key, self._message)


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its class name if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
