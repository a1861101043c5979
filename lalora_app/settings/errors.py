"""Errors of a run's settings and data."""


class ConfigError(ValueError):
    """A value that the run cannot start with: names the key, the value and the law it breaks."""


class DataError(ConfigError):
    """The data cannot be trained on; ``key`` is what a refusal may tell, without any value."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}{message}")
        self.key = key


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
