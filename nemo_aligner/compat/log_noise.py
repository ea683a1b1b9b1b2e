"""Log lines of NeMo and megatron-core that say nothing to a user and bury those that do."""

import logging

# NeMo warns once for each of about 60 fields that it leaves at megatron-core's default, each time a config is built.
_NOISE = ("does not have field.name:",)


def apply() -> None:
    from nemo.utils import logging as nemo_logging

    logger = nemo_logging._logger
    if not any(isinstance(existing, _DropNoise) for existing in logger.filters):
        logger.addFilter(_DropNoise())
    logging.getLogger("megatron.core.num_microbatches_calculator").setLevel(logging.WARNING)


class _DropNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(noise in message for noise in _NOISE)
