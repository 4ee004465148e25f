"""The error for invalid settings and inputs."""


class ConfigError(ValueError):
    """An invalid setting or input; one sentence: what is wrong, where, and how to fix it."""


def check(condition: bool, message: str) -> None:
    """Raises ConfigError with this message if the condition is false."""
    if not condition:
        raise ConfigError(message)


def check_positive(name: str, value: float) -> None:
    """Raises ConfigError unless the value is above 0; NaN is not."""
    if not value > 0:
        raise ConfigError(f"{name} must be a positive number, got {value}")
