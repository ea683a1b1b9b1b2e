"""Fine-tune a GPT model by rejection sampling; see configs/gpt_rs_actor.yaml for every setting.

    python examples/nlp/gpt/train_gpt_rs_actor.py pretrained_checkpoint.restore_from_path=model.nemo \
        "model.data.data_prefix={train: [train.jsonl], validation: [val.jsonl], test: [val.jsonl]}" \
        model.rs.reward.target=rewards.py:reward

`--profile` traces one RS step after a warm-up step; `--profile 3` traces three (`trainer.rs.profile`).
"""

import sys

import nemo_aligner.compat.quiet_imports  # noqa: F401  must come first: it silences the imports below

# isort: split
import torch
from megatron.core import parallel_state
from megatron.core.utils import divide
from nemo.core.config import hydra_runner
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_aligner.algorithms.rs import RSTrainer
from nemo_aligner.data.nlp.builders import (
    build_dataloader,
    build_train_valid_test_rlhf_datasets,
    collate_with_pad_to_max_batch,
)
from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
from nemo_aligner.rewards.build import build_reward
from nemo_aligner.utils.distributed import Timer
from nemo_aligner.utils.rank_failure import end_all_ranks_on_error
from nemo_aligner.utils.run_lock import hold_log_dir
from nemo_aligner.utils.termination import StopRequested
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    exit_on_config_error,
    exit_on_reward_error,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_peft,
    init_using_ptl,
    join_started_processes,
    resolve_and_create_trainer,
    retrieve_custom_trainer_state_dict,
    with_profile_as_override,
)
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo

OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
OmegaConf.register_new_resolver("int_div", lambda x, y: x // y, replace=True)


@hydra_runner(config_path="../../../configs", config_name="gpt_rs_actor")
def main(cfg) -> None:
    with exit_on_config_error(), exit_on_reward_error(), end_all_ranks_on_error():
        train(cfg)


def train(cfg) -> None:
    restore_path = OmegaConf.select(cfg, "pretrained_checkpoint.restore_from_path")
    cfg.model = load_and_override_model_config(restore_path, cfg.model)
    trainer = resolve_and_create_trainer(cfg, "rs")
    join_started_processes(trainer)
    known_dir = cfg.exp_manager.get("explicit_log_dir")
    if known_dir is not None:
        hold_log_dir(known_dir)  # must come before NeMo moves an earlier run's files within it
    log_dir = exp_manager(trainer, cfg.exp_manager)
    if known_dir is None:
        hold_log_dir(log_dir)
    logger = CustomLoggerWrapper(trainer.loggers)

    model = load_from_nemo(MegatronGPTRSModel, cfg.model, trainer, strict=True, restore_path=restore_path)
    init_peft(model, cfg.model)
    resumed_state = retrieve_custom_trainer_state_dict(trainer)
    init_distributed(trainer, model, cfg.model.get("transformer_engine", False))

    train_ds, train_dataloader, val_dataloader = build_data(cfg, model, resumed_state)
    init_using_ptl(trainer, model, dummy_dataloader(cfg, train_ds), train_ds)
    del model._train_dl  # the dummy is no longer needed
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    ckpt_callback = add_custom_checkpoint_callback(trainer, model)
    logger.log_hyperparams(OmegaConf.to_container(cfg))

    rm = build_reward(cfg, model.tokenizer)
    rs_trainer = RSTrainer(
        cfg=cfg.trainer.rs,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=train_dataloader,
        val_dataloader=val_dataloader,
        logger=logger,
        ckpt_callback=ckpt_callback,
        run_timer=Timer(cfg.exp_manager.get("max_time_per_run")),
        num_rollouts_per_prompt=cfg.model.rs.num_rollouts_per_prompt,
        top_n_rollouts=cfg.model.rs.top_n_rollouts,
        rm=rm,
        rollout_dir=log_dir / "rollouts",
    )
    if resumed_state is not None:
        rs_trainer.load_state_dict(resumed_state)
    try:
        rs_trainer.fit()
    except KeyboardInterrupt:
        logging.info(f"interrupted at RS step {rs_trainer.step}; all rollouts so far are in {log_dir / 'rollouts'}")
        sys.exit(130)
    except StopRequested as stop:
        logging.info(f"stopped by SIGTERM at RS step {rs_trainer.step}{stop}")
        sys.exit(143)
    finally:
        rm.close()


def build_data(cfg, model, resumed_state):
    """The training prompts, their dataloader, and the dataloader of the validation prompts."""
    rs = cfg.model.rs
    train_ds, validation_ds, _ = build_train_valid_test_rlhf_datasets(
        cfg=cfg.model,
        data_prefix=cfg.model.data.data_prefix,
        data_impl=cfg.model.data.data_impl,
        splits_string=cfg.model.data.splits_string,
        train_valid_test_num_samples=[-1, -1, -1],
        seq_length=cfg.model.data.seq_length,
        seed=cfg.model.seed,
        tokenizer=model.tokenizer,
    )
    train_ds.count_over_long()
    validation_ds.count_over_long()
    collate_fn = collate_with_pad_to_max_batch(rs.length_params.max_length, model.tokenizer.eos_id, cfg)
    train_dataloader = build_dataloader(
        cfg=cfg,
        dataset=train_ds,
        consumed_samples=0 if resumed_state is None else resumed_state["consumed_samples"],
        mbs=rs.rollout_micro_batch_size,
        gbs=rs.num_rollout_samples,
        collate_fn=collate_fn,
        load_gbs=False,
    )
    val_dataloader = build_dataloader(
        cfg=cfg,
        dataset=validation_ds,
        consumed_samples=0,
        mbs=rs.val_rollout_micro_batch_size,
        gbs=rs.num_val_samples,
        collate_fn=collate_fn,
        load_gbs=False,
        use_random_sampler=False,
    )
    return train_ds, train_dataloader, val_dataloader


def dummy_dataloader(cfg, train_ds):
    """A placeholder: Lightning's setup needs a loader of training rows, but only rollouts will create these."""
    batch_size = divide(cfg.model.global_batch_size, parallel_state.get_data_parallel_world_size())
    return torch.utils.data.DataLoader(train_ds, batch_size=batch_size)


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn", force=True)
    sys.argv = with_profile_as_override(sys.argv)
    main()
