"""Serve a reward model over HTTP; see configs/inference_rm.yaml for every setting.

    python examples/nlp/gpt/serve_reward_model.py rm_model_file=reward.nemo trainer.devices=1 inference.port=5555

Ranks beyond those of one model copy serve further replicas. The trainer finds the server through
`remote_rm.reward_model`. If the trainer runs on another machine, set inference.address=0.0.0.0 here.
"""

from functools import partial

import torch
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
from nemo.core.config import hydra_runner
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import open_dict
from pytorch_lightning.trainer.trainer import Trainer

from nemo_aligner.algorithms.reward_server import MODEL_KEYS, RewardModelServer
from nemo_aligner.compat import cpu
from nemo_aligner.models.nlp.gpt.reward_model_classes import REWARD_MODEL_CLASS_DICT, RewardModelType
from nemo_aligner.servers.triton_endpoint import LOOPBACK, check_inference_config, check_port_is_free
from nemo_aligner.utils.config_checks import check_machine
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.interpolations import resolve_interpolations
from nemo_aligner.utils.nemo_archive import check_archive
from nemo_aligner.utils.rank_failure import end_all_ranks_on_error
from nemo_aligner.utils.text_generation_utils import tokenize_batch
from nemo_aligner.utils.train_script_utils import exit_on_config_error, init_distributed
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo
from nemo_aligner.utils.value_checks import ALL_RULES
from nemo_aligner.utils.value_rules import COUNT, check_section


@hydra_runner(config_path="../../../configs", config_name="inference_rm")
def main(cfg) -> None:
    with exit_on_config_error(), end_all_ranks_on_error():
        serve(cfg)


def serve(cfg) -> None:
    resolve_interpolations(cfg)
    check_archive(cfg.rm_model_file, key="rm_model_file")
    machine = ("trainer.devices", "trainer.num_nodes", "trainer.accelerator")
    check_section(cfg, {"model.forward_micro_batch_size": COUNT, **{key: ALL_RULES[key] for key in machine}}, {})
    check_machine(cfg)
    endpoint = check_inference_config(cfg.get("inference"), MODEL_KEYS)
    if is_global_rank_zero():
        check_port_is_free(endpoint.get("address", LOOPBACK), endpoint["port"])
    with open_dict(cfg):
        cfg.model = load_and_override_model_config(cfg.rm_model_file, cfg.model)
        if cfg.trainer.accelerator == "cpu":
            cpu.enable()
            cfg.model.use_cpu_initialization = True
    model_class = reward_model_class(cfg.model.get("reward_model_type", RewardModelType.BINARY_RANKING.value))
    trainer = Trainer(strategy=NLPDDPStrategy(), **cfg.trainer)

    model = load_from_nemo(model_class, cfg.model, trainer, strict=True, restore_path=cfg.rm_model_file)
    model.freeze()
    init_distributed(trainer, model, cfg.model.get("transformer_engine", False))
    model = model.cuda()
    model.prepare_for_inference()

    server = RewardModelServer(
        infer_fn=model.infer,
        tokenize_func=partial(tokenize_batch, tokenizer=model.tokenizer, max_len=cfg.model.encoder_seq_length),
        model_forward_micro_batch_size=cfg.model.forward_micro_batch_size,
        vocab_size=model.padded_vocab_size,
        max_length=cfg.model.encoder_seq_length,
        **endpoint,
    )
    server.run_server()


def reward_model_class(name: str) -> type:
    """The class for a value of `model.reward_model_type`."""
    try:
        return REWARD_MODEL_CLASS_DICT[RewardModelType(name)]
    except ValueError as error:
        known = ", ".join(kind.value for kind in RewardModelType)
        raise ConfigError(f"model.reward_model_type={name!r} is not known; give one of {known}") from error


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn", force=True)
    main()
