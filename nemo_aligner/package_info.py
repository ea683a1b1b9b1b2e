"""Metadata of the package. The distribution is `megatron-rs-aligner`; the import package is `nemo_aligner`."""

MAJOR, MINOR, PATCH, PRE_RELEASE = 0, 1, 0, ""

__shortversion__ = f"{MAJOR}.{MINOR}.{PATCH}"
__version__ = __shortversion__ + PRE_RELEASE
__package_name__ = "nemo_aligner"
__description__ = "Rejection-sampling fine-tuning of NeMo / Megatron-Core GPT models"
__license__ = "Apache-2.0"
__homepage__ = ""
__repository_url__ = ""
__download_url__ = ""
__contact_names__ = "The maintainers"
__contact_emails__ = ""
__keywords__ = "rejection sampling, RAFT, best-of-n, expert iteration, Megatron, NeMo, LLM"
