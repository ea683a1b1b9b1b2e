"""Rules for single values of a configuration, and the check of a section against them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from nemo_aligner.utils.errors import ConfigError


class Rule(NamedTuple):
    holds: Callable[[Any], bool]
    words: str  # what the value must be


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_count(value) -> bool:
    return type(value) is int and value > 0


COUNT = Rule(is_count, "a positive whole number")
COUNT_OR_NULL = Rule(lambda value: value is None or is_count(value), "a positive whole number or null")
WHOLE = Rule(lambda value: type(value) is int, "a whole number")
WHOLE_OR_NULL = Rule(lambda value: value is None or type(value) is int, "a whole number or null")
WHOLE_FROM_0 = Rule(lambda value: type(value) is int and value >= 0, "a whole number, 0 or larger")
NUMBER_FROM_0 = Rule(lambda value: is_number(value) and value >= 0, "a number, 0 or larger")
SWITCH = Rule(lambda value: isinstance(value, bool), "true or false")
PORT = Rule(lambda value: is_count(value) and value < 2**16, "a port number, 1 to 65535")

_ABSENT = object()


def check_section(
    section: DictConfig, required: Mapping[str, Rule], optional: Mapping[str, Rule], prefix: str = ""
) -> None:
    """Check each value of a configuration, or of a section of it, on its own.

    Args:
        required, optional: rules by key, dotted for nested keys.
        prefix: prefix of the keys in messages.

    Raises:
        ConfigError: one line with the key, its value and what it must be.
    """
    for key, rule in {**required, **optional}.items():
        value = OmegaConf.select(section, key, default=_ABSENT)
        if value is _ABSENT and key in required:
            raise ConfigError(f"{prefix}{key} is not set; it must be {rule.words}")
        if value is not _ABSENT and not rule.holds(value):
            raise ConfigError(f"{prefix}{key}={value!r} must be {rule.words}")
