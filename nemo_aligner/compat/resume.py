"""Resuming with NeMo 2.0 and a newer torch."""

import collections
import typing
from pathlib import Path


def apply() -> None:
    _allow_configs_in_checkpoints()
    _resume_after_a_kill()


def _allow_configs_in_checkpoints() -> None:
    """By default, torch 2.6 and newer load only tensors and plain containers, but Lightning stores the model's config.

    megatron-core 0.9 uses the default of `weights_only`. Removal: with a NeMo that stores a plain dict.
    """
    import torch
    from omegaconf import DictConfig, ListConfig, base, nodes

    torch.serialization.add_safe_globals(
        [
            DictConfig, ListConfig, base.ContainerMetadata, base.Metadata, nodes.AnyNode, nodes.ValueNode, typing.Any,
            collections.defaultdict, dict, int, list,
        ]
    )  # fmt: skip


def _resume_after_a_kill() -> None:
    """NeMo refuses to resume if its only last checkpoint is incomplete, or if there are two of them.

    The first results from a kill during the first save, the second from a kill between the end of a save and the
    removal of the previous checkpoint. This patch finds the newest complete one, and refuses a new run in the folder
    of another one. Removal: with the first NeMo that does so itself.
    """
    from nemo.utils import exp_manager, logging

    from nemo_aligner.utils.checkpoints import newest_complete_checkpoint
    from nemo_aligner.utils.errors import ConfigError

    check_resume = exp_manager.check_resume
    if check_resume.__module__ == __name__:
        return

    def check_resume_after_a_kill(
        trainer, log_dir, resume_if_exists=False, resume_past_end=False, resume_ignore_no_checkpoint=False,
        dirpath=None, resume_from_checkpoint=None,
    ):  # fmt: skip
        folder = Path(dirpath or Path(log_dir, "checkpoints"))
        is_sought = resume_if_exists or resume_from_checkpoint is None
        newest = newest_complete_checkpoint(folder) if is_sought else None
        if newest is not None and not resume_if_exists:
            raise ConfigError(
                f"exp_manager.resume_if_exists=False, but {newest} is of a run in this folder, with "
                "which a new one would be mixed up; give another exp_manager.explicit_log_dir, or resume_if_exists=True"
            )
        if newest is not None:
            resume_if_exists, resume_from_checkpoint = False, str(newest)
        elif resume_if_exists and resume_ignore_no_checkpoint:
            resume_if_exists = False
            logging.info(f"no complete checkpoint in {folder}: starting from {resume_from_checkpoint or 'scratch'}")
        check_resume(
            trainer, log_dir, resume_if_exists, resume_past_end, resume_ignore_no_checkpoint, dirpath,
            resume_from_checkpoint,
        )  # fmt: skip

    exp_manager.check_resume = check_resume_after_a_kill
