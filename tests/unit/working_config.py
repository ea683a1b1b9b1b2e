"""A configuration that passes the checks, its variations, and what the checks say of those that do not."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_aligner.utils.config_checks import check_rs_config
from nemo_aligner.utils.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
OmegaConf.register_new_resolver("int_div", lambda x, y: x // y, replace=True)


WORKING = (
    "trainer.num_nodes=1", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=32",
    "pretrained_checkpoint.restore_from_path=model.nemo", "model.optim.name=adamw", "model.megatron_amp_O2=False",
    "model.data.data_prefix={train: [train.jsonl], validation: [val.jsonl], test: [val.jsonl]}",
    "model.rs.reward.target=reward.py:reward", "model.rs.num_rollout_samples=8",
    "model.rs.rollout_micro_batch_size=2", "model.global_batch_size=8", "model.micro_batch_size=2",
)  # fmt: skip


def config(*overrides: str, name: str = "gpt_rs_actor"):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose(name, overrides=[*WORKING, *overrides])
    OmegaConf.resolve(cfg)
    return cfg


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        check_rs_config(config(*overrides))
    message = str(error.value)
    assert "\n" not in message
    return message
