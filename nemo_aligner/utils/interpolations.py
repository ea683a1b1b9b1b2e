"""Resolution of a configuration's interpolations, `${key}` and `${function:arguments}`."""

import re
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.value_checks import ALL_RULES
from nemo_aligner.utils.value_rules import Rule

_REFERENCE = re.compile(r"\$\{([^${}:]+)\}")  # to a key; references to a function have a colon
_ABSENT = object()
_SET = Rule(lambda value: value is not None and value is not _ABSENT, "set")


def resolve_interpolations(cfg: DictConfig) -> None:
    """Replace each interpolation in `cfg` by its value, in place.

    Raises:
        ConfigError: one line with a key that cannot be resolved, its interpolation and the reason.
    """
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:  # it does not name the key
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
    """The error of the first key whose failure is not caused by that of another key."""
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
    key, value, reason = failures[0]  # the references form a cycle
    return f"{key}={value} cannot be had: {reason}"


def _referenced_keys(key: str, value: str) -> list[str]:
    """The keys that the interpolation of `key` refers to; n leading dots make a reference relative, n levels up."""
    names = []
    for reference in _REFERENCE.findall(value):
        name = reference.strip().lstrip(".")
        num_levels = len(reference.strip()) - len(name)
        names.append(".".join([*key.split(".")[:-num_levels], name]) if num_levels else name)
    return names
