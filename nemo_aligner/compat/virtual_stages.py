"""Virtual pipeline stages with NeMo 2.0.0 and megatron-core 0.9.0.

- NeMo builds them only with `megatron_amp_O2`, which in float32 has nothing to do, and then cannot wrap the model.
- Without O2 it wraps the model in torch's DDP, which sees no parameters, as the chunks are in a plain list. DDP's
  communication is disabled anyway; see `train_utils.grad_reductions`.
- Megatron exchanges activations and gradients in one batch of P2P operations, in which the messages between two ranks
  are matched by order alone. In a pipeline of two, the previous stage is also the next, and each silently takes the
  other's gradients for activations. (Megatron's training script refuses such a pipeline; the library does not.)

Removal: the first two with a NeMo that does not raise for virtual stages without O2, the third with a megatron-core
whose `_batched_p2p_ops` orders its messages by the parity of the rank, as `_p2p_ops` does.
"""

import contextlib

from omegaconf import DictConfig, open_dict


def apply() -> None:
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy

    configure_ddp = NLPDDPStrategy.configure_ddp
    if configure_ddp.__module__ == __name__:
        return

    def configure_ddp_of_whole_models(self):
        if count(self.model.cfg) == 1 or self.model.megatron_amp_O2 or self.model.with_distributed_adam:
            configure_ddp(self)
        else:
            self._model = self.model

    NLPDDPStrategy.configure_ddp = configure_ddp_of_whole_models


def count(cfg: DictConfig) -> int:
    """Model chunks per pipeline rank, according to the model section of a configuration."""
    return cfg.get("virtual_pipeline_model_parallel_size") or 1


def choose_messages(cfg: DictConfig) -> None:
    """Set `batch_p2p_comm` in `cfg` to a value that works, unless it is already set."""
    if count(cfg) > 1 and cfg.get("batch_p2p_comm") is None:
        with open_dict(cfg):
            cfg.batch_p2p_comm = not (cfg.pipeline_model_parallel_size == 2 or cfg.get("overlap_p2p_comm", False))


@contextlib.contextmanager
def built_without_O2(model, cfg: DictConfig):
    """Context manager in which NeMo's initializer can build `model` in float32 with virtual stages and without O2."""
    if count(cfg) == 1 or cfg.get("megatron_amp_O2", False):
        yield
        return
    # object.__setattr__, because a module accepts no attributes before its initializer has run
    object.__setattr__(model, "_wrap_model_for_O2", lambda: None)
    with open_dict(cfg):
        cfg.megatron_amp_O2 = True
    try:
        yield
    finally:
        with open_dict(cfg):
            cfg.megatron_amp_O2 = False
        object.__delattr__(model, "_wrap_model_for_O2")
    model.megatron_amp_O2 = False
    model.cfg = cfg  # NeMo keeps a copy
