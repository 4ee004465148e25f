"""The error for settings and inputs that a person must correct."""


class ConfigError(ValueError):
    """A setting or an input that cannot work: one sentence saying what is wrong, where, and how to fix it."""


def check(condition: bool, message: str) -> None:
    """Raises ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_positive(name: str, value: float) -> None:
    """Raises ConfigError unless the value is above 0; NaN is not."""
    if not value > 0:
        raise ConfigError(f"{name} must be a positive number, got {value}")
