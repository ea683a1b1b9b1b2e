"""Errors of which the message says what to do: the configuration can be mended, the reward has to be had elsewhere."""


class ConfigError(ValueError):
    """A mistake in the configuration or in a file it names. One line: the key or file, its value and the fix."""


class RewardError(RuntimeError):
    """A reward could not be had. The message is one line and the same on every rank of the replica."""
