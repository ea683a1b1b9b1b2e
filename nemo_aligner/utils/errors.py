"""Errors whose message tells the user what to do: fix the configuration or its files, or the source of the reward."""


class ConfigError(ValueError):
    """A mistake in the configuration or in a file it names. One line: the key or file, its value and the fix."""


class PromptError(ConfigError):
    """Prompts could not be read in the middle of a run. Raised on every rank, though messages may differ."""


class RewardError(RuntimeError):
    """A reward could not be obtained. The message is one line and the same on every rank of the replica."""
