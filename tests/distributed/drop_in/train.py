"""A training script as NeMo-Aligner's users have them: written against the published names alone."""

import torch
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.utils import divide
from nemo.core.config import hydra_runner
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from omegaconf.omegaconf import OmegaConf

from nemo_aligner.algorithms.rs import RSTrainer
from nemo_aligner.data.nlp.builders import (
    build_dataloader,
    build_train_valid_test_rlhf_datasets,
    collate_with_pad_to_max_batch,
)
from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient
from nemo_aligner.utils.distributed import Timer
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_peft,
    init_using_ptl,
    resolve_and_create_trainer,
    retrieve_custom_trainer_state_dict,
)
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo

OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
OmegaConf.register_new_resolver("int_div", lambda x, y: x // y, replace=True)
mp.set_start_method("spawn", force=True)


@hydra_runner(config_path=".", config_name="gpt_rs_actor")
def main(cfg) -> None:
    cfg.model = load_and_override_model_config(cfg.pretrained_checkpoint.restore_from_path, cfg.model)
    logging.info(f"\n{OmegaConf.to_yaml(cfg)}")
    trainer = resolve_and_create_trainer(cfg, "rs")
    exp_manager(trainer, cfg.exp_manager)
    logger = CustomLoggerWrapper(trainer.loggers)
    path = cfg.pretrained_checkpoint.restore_from_path
    model = load_from_nemo(MegatronGPTRSModel, cfg.model, trainer, strict=True, restore_path=path)
    init_peft(model, cfg.model)

    consumed_samples, trainer_state = 0, None
    if trainer.ckpt_path is not None:
        trainer_state = retrieve_custom_trainer_state_dict(trainer)
        consumed_samples = trainer_state["consumed_samples"]
    init_distributed(trainer, model, cfg.model.get("transformer_engine", False))

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
    eos_id, max_length = model.tokenizer.eos_id, cfg.model.rs.length_params.max_length
    loader = {
        "cfg": cfg,
        "mbs": cfg.model.rs.rollout_micro_batch_size,
        "collate_fn": collate_with_pad_to_max_batch(max_length, eos_id, cfg),
        "load_gbs": False,
    }
    train_dataloader = build_dataloader(
        dataset=train_ds, consumed_samples=consumed_samples, gbs=cfg.model.rs.num_rollout_samples, **loader
    )
    val_dataloader = build_dataloader(
        dataset=validation_ds, consumed_samples=0, gbs=cfg.model.rs.num_val_samples, use_random_sampler=False, **loader
    )
    rows = divide(cfg.model.global_batch_size, parallel_state.get_data_parallel_world_size())
    init_using_ptl(trainer, model, torch.utils.data.DataLoader(dataset=train_ds, batch_size=rows), train_ds)
    del model._train_dl
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    ckpt_callback = add_custom_checkpoint_callback(trainer, model)
    logger.log_hyperparams(OmegaConf.to_container(cfg))
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
        rm=RemoteGPTRMClient(cfg.remote_rm),
    )
    if trainer_state is not None:
        rs_trainer.load_state_dict(trainer_state)
    rs_trainer.fit()


if __name__ == "__main__":
    main()
