"""Builds the configured reward: a Python function, a server, or a weighted sum of these."""

import math
import numbers
import re
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient
from nemo_aligner.rewards.python_reward import PythonRewardModel, load_reward_function
from nemo_aligner.rewards.weighted_sum import WeightedSum
from nemo_aligner.servers.http_communicator import INIT_TIMEOUT_S, HTTPCommunicator, not_there
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.value_rules import COUNT_OR_NULL, PORT, Rule, check_section

PART_KEYS = {"weight", "target", "kwargs", "remote_rm"}
REMOTE_KEYS = {"reward_model", "pad_to_length", "wait_for_server_s", "request_timeout_s", "retry_deadline_s"}
_SECONDS = Rule(lambda value: type(value) in (int, float) and value > 0, "a number of seconds above 0")
_RULES_OF_A_SERVER = {
    "reward_model.name": Rule(
        lambda value: isinstance(value, str) and re.fullmatch(r"[^\s/]+", value) is not None, "a model's name"
    ),
    "reward_model.ip": Rule(
        lambda value: isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None,
        "a host name or IPv4 address",
    ),
    "reward_model.port": PORT,
}
_RULES_OF_ITS_REQUESTS = {
    "wait_for_server_s": _SECONDS,
    "request_timeout_s": _SECONDS,
    "retry_deadline_s": _SECONDS,
    "pad_to_length": Rule(COUNT_OR_NULL.holds, "a number of tokens, or null"),
}
# An unreachable server is reported after this long, whether or not the run keeps waiting for it.
PROBE_S = 5.0


@dataclass(frozen=True)
class RewardSource:
    """One configured reward: a Python function (`target`) or a server (`remote_rm`, its section)."""

    key: str
    target: str | None
    kwargs: DictConfig | None
    remote_key: str
    remote_rm: DictConfig | None
    weight: float = 1.0

    def build(self, tokenizer, end_strings) -> PythonRewardModel | RemoteGPTRMClient:
        if self.target is None:
            return RemoteGPTRMClient(self.remote_rm)
        function = load_reward_function(self.target, self.kwargs, self.key)
        return PythonRewardModel(function, tokenizer, end_strings)


def build_reward(cfg: DictConfig, tokenizer) -> PythonRewardModel | RemoteGPTRMClient | WeightedSum:
    """Connect to servers, load functions. Collective over all ranks."""
    sources = reward_sources(cfg)
    end_strings = cfg.model.rs.sampling_params.end_strings
    if "" in sources:
        return sources[""].build(tokenizer, end_strings)
    return WeightedSum(
        {name: (source.weight, source.build(tokenizer, end_strings)) for name, source in sources.items()}
    )


def reward_sources(cfg: DictConfig) -> dict[str, RewardSource]:
    """Every configured reward by name; a single one has the name "".

    Raises:
        ConfigError: if none, or both one and several, are configured, or an entry is neither function nor server.
    """
    target, kwargs = (OmegaConf.select(cfg, f"model.rs.reward.{key}") for key in ("target", "kwargs"))
    several = OmegaConf.select(cfg, "model.rs.rewards")
    if several is not None and (not isinstance(several, DictConfig) or not several or "" in several):
        raise ConfigError(f"model.rs.rewards={several} must be null or a mapping of names to rewards")
    if target is None and kwargs is not None:
        raise ConfigError(
            f"model.rs.reward.kwargs={kwargs} is set, but not model.rs.reward.target; give the latter as "
            "package.module.function or path/to/file.py:function"
        )
    if not several:
        if target is None and cfg.get("remote_rm") is None:
            raise ConfigError(
                "neither model.rs.reward.target (a Python function) nor remote_rm (a server) is set: set one"
            )
        return {"": RewardSource("model.rs.reward", target, kwargs, "remote_rm", cfg.get("remote_rm"))}
    if target is not None:
        raise ConfigError("model.rs.reward.target and model.rs.rewards are both set; move the former into the latter")
    return {name: _part(name, entry) for name, entry in several.items()}


def _part(name: str, entry) -> RewardSource:
    key = f"model.rs.rewards.{name}"
    if not isinstance(entry, DictConfig):
        raise ConfigError(f"{key}={entry!r} must be a mapping: weight, and target (and kwargs) or remote_rm")
    unknown = set(entry) - PART_KEYS
    if unknown:
        raise ConfigError(f"{key}.{min(unknown)} is not a known key; there are {', '.join(sorted(PART_KEYS))}")
    weight = entry.get("weight")
    if not isinstance(weight, numbers.Real) or isinstance(weight, bool) or not math.isfinite(weight):
        raise ConfigError(f"{key}.weight={weight!r} must be a number")
    if (entry.get("target") is None) == (entry.get("remote_rm") is None):
        raise ConfigError(f"{key} needs either target (a Python function) or remote_rm (a server)")
    return RewardSource(
        key, entry.get("target"), entry.get("kwargs"), f"{key}.remote_rm", entry.get("remote_rm"), float(weight)
    )


def check_reward_config(cfg: DictConfig) -> list[str]:
    """Refuse rewards that cannot work: import functions and probe servers; returns warnings.

    Raises:
        ConfigError: one line with the key and the fix.
    """
    warnings = []
    for source in reward_sources(cfg).values():
        if source.target is not None:
            load_reward_function(source.target, source.kwargs, source.key)
            continue
        _check_remote(source.remote_key, source.remote_rm)
        width, longest = source.remote_rm.get("pad_to_length"), cfg.model.data.seq_length
        if width is not None and width < longest:
            warnings.append(
                f"{source.remote_key}.pad_to_length={width} is less than model.data.seq_length={longest}: a longer "
                "rollout will stop the run"
            )
    if rank_zero_only.rank == 0:
        for source in reward_sources(cfg).values():
            if source.target is None:
                warnings.extend(_ask_for_server(source.remote_key, source.remote_rm))
    return warnings


def _check_remote(key: str, remote: DictConfig) -> None:
    if not isinstance(remote, DictConfig) or not isinstance(remote.get("reward_model"), DictConfig):
        raise ConfigError(f"{key}={remote} must be a section with reward_model.name, .ip and .port")
    unknown = set(remote) - REMOTE_KEYS
    if unknown:
        raise ConfigError(f"{key}.{min(unknown)} is not a known key; there are {', '.join(sorted(REMOTE_KEYS))}")
    check_section(remote, _RULES_OF_A_SERVER, _RULES_OF_ITS_REQUESTS, prefix=f"{key}.")


def _ask_for_server(key: str, remote: DictConfig) -> list[str]:
    """Raise if the server is unreachable and the run would not wait for it; otherwise return warnings."""
    server, patience = remote.reward_model, remote.get("wait_for_server_s", INIT_TIMEOUT_S)
    waited = min(patience, PROBE_S)
    if HTTPCommunicator.is_ready(server.name, server.ip, server.port, waited):
        return []
    line = not_there(server.name, server.ip, server.port, waited, key)
    if patience <= PROBE_S:
        raise ConfigError(f"{line}; {key}.wait_for_server_s lets the run wait for longer")
    return [f"{line}; waiting for up to {patience:.0f} s more once the policy is loaded"]
