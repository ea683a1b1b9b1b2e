"""Resolving a configuration's interpolations, `${key}` and `${function:arguments}`."""

import re
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.value_checks import ALL_RULES
from nemo_aligner.utils.value_rules import Rule

_REFERENCE = re.compile(r"\$\{([^${}:]+)\}")  # to a key; one to a function has a colon
_ABSENT = object()
_SET = Rule(lambda value: value is not None and value is not _ABSENT, "set")


def resolve_interpolations(cfg: DictConfig) -> None:
    """Replace each interpolation in `cfg`, in place, by what it stands for.

    Raises:
        ConfigError: one line with a key that cannot be had, what it is made from and what that needs.
    """
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:  # which does not know the key
        failures = list(_failures(cfg))
        if not failures:
            raise
        raise ConfigError(_cause(cfg, failures)) from error


def _failures(cfg: DictConfig) -> Iterator[tuple[str, str, str]]:
    """The dotted keys that cannot be resolved, their interpolations and the reasons."""
    for key, value in _leaves("", OmegaConf.to_container(cfg, resolve=False)):
        try:
            OmegaConf.select(cfg, key)
        except OmegaConfBaseException as error:
            yield key, value, str(error).splitlines()[0]


def _leaves(key: str, value) -> Iterator[tuple[str, object]]:
    if not isinstance(value, (dict, list)):
        yield key, value
        return
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(f"{key}.{name}" if key else str(name), part)


def _cause(cfg: DictConfig, failures: list[tuple[str, str, str]]) -> str:
    """What is wrong with the first key that does not fail for another's sake."""
    for key, value, reason in failures:
        try:
            needed = {name: OmegaConf.select(cfg, name, default=_ABSENT) for name in _referenced_keys(key, value)}
        except OmegaConfBaseException:
            continue
        for name, found in needed.items():
            rule = ALL_RULES.get(name, _SET)
            if not rule.holds(found):
                state = "not set" if found is _ABSENT else repr(found)
                return f"{key}={value} needs {name}, which is {state}; it must be {rule.words}"
        return f"{key}={value} cannot be had: {reason}"
    key, value, reason = failures[0]  # one of those that need each other
    return f"{key}={value} cannot be had: {reason}"


def _referenced_keys(key: str, value: str) -> list[str]:
    """The keys from which `key` is interpolated; a reference that begins with n dots starts n levels above."""
    names = []
    for reference in _REFERENCE.findall(value):
        name = reference.strip().lstrip(".")
        num_levels = len(reference.strip()) - len(name)
        names.append(".".join([*key.split(".")[:-num_levels], name]) if num_levels else name)
    return names
