"""Errors of which the message says what to do: the configuration can be mended, the reward has to be had elsewhere."""


class ConfigError(ValueError):
    """A mistake in the configuration or in a file it names. One line: the key or file, its value and the fix."""


class PromptError(ConfigError):
    """Prompts could not be read in the middle of a run. The same on every rank of the job, or of a kind with it."""


class RewardError(RuntimeError):
    """A reward could not be had. The message is one line and the same on every rank of the replica."""
