"""The one place where NeMo 2.0.0, megatron-core 0.9.0 and torch are adapted to each other and to this machine.

`apply()` works around a missing Apex or Transformer Engine and a newer torch, each only where it applies, and fixes
bugs of NeMo and megatron-core everywhere. `cpu.enable()` redirects CUDA names to the CPU for a run that asks for the
CPU; it may be called before or after NeMo is imported. `checkpoint_pickles` patches nothing: it checks the pickles of
an archive before the libraries load them, which would run their contents.
"""


def apply() -> None:
    """Adapt the libraries to what is installed. Called by the modules that import NeMo's models; idempotent."""
    from nemo_aligner.compat import (
        adam_step,
        adapters,
        checkpoint_writer,
        communicators,
        cpu,
        device,
        gradient_fusion,
        log_noise,
        mcore_optimizer,
        no_apex,
        no_transformer_engine,
        numpy_version,
        resume,
        token_ids,
        torch_version,
        virtual_stages,
    )  # fmt: skip

    no_apex.apply()
    no_transformer_engine.apply()
    torch_version.apply()
    gradient_fusion.apply()
    numpy_version.apply()
    adapters.apply()
    checkpoint_writer.apply()
    resume.apply()
    adam_step.apply()
    virtual_stages.apply()
    mcore_optimizer.apply()
    communicators.apply()
    log_noise.apply()
    token_ids.apply()
    if device.on_cpu():
        cpu.redirect_nemo()
