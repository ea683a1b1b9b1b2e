"""Suppression of log lines and warnings of NeMo and megatron-core that tell users nothing and bury relevant ones."""

import functools
import logging

# NeMo warns once for each of about 60 fields that it leaves at megatron-core's default, each time a config is built.
_NOISE = ("does not have field.name:",)


def apply() -> None:
    from nemo.utils import logging as nemo_logging

    logger = nemo_logging._logger
    if not any(isinstance(existing, _DropNoise) for existing in logger.filters):
        logger.addFilter(_DropNoise())
    logging.getLogger("megatron.core.num_microbatches_calculator").setLevel(logging.WARNING)
    _leave_out_what_linear_layers_warn_of()


class _DropNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(noise in message for noise in _NOISE)


def _leave_out_what_linear_layers_warn_of() -> None:
    """megatron-core 0.9's linear layers pass a deprecated, unused argument and so trigger their own warning.

    They do so in every forward pass, 768 times in a training pass over 8 micro-batches and 24 layers, which costs a
    millisecond of host time even if no warning is shown. Removal: with megatron-core 0.10, which drops the argument.
    """
    from megatron.core.tensor_parallel import layers

    warns = layers.linear_with_grad_accumulation_and_async_allreduce
    if hasattr(warns, "without_deprecated_argument"):
        return

    @functools.wraps(warns)
    def linear(*args, async_grad_allreduce=None, **kwargs):
        return warns(*args, **kwargs)

    linear.without_deprecated_argument = True
    layers.linear_with_grad_accumulation_and_async_allreduce = linear
