"""The one error that means: the user can mend this, and the message says how."""


class ConfigError(ValueError):
    """A mistake in the configuration or in a file it names. One line: the key or file, its value and the fix."""
