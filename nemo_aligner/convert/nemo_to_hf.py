"""Exports `.nemo` archives of Llama-family language models to Hugging Face folders."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning import Trainer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_aligner.compat import cpu
from nemo_aligner.convert.hf_source import CAUSAL_LM
from nemo_aligner.convert.hf_to_nemo import PRECISIONS, ConvertedGPTModel, cpu_trainer, model_config
from nemo_aligner.convert.merge_lora import merge_lora_
from nemo_aligner.convert.name_map import hf_names, unpack
from nemo_aligner.models.nlp.gpt.hf_tokenizer import FILES
from nemo_aligner.models.nlp.gpt.lora import add_adapters_
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.nemo_archive import CONFIG_FILE, opened
from nemo_aligner.utils.peft_checks import check_same_model, stored_lora_config
from nemo_aligner.utils.utils import load_from_nemo

# Model key, NeMo's default if it is missing, and the values that a Llama may have.
LLAMA_VALUES = (
    ("mcore_gpt", False, (True,)),
    ("name", "", ("", "te_gpt")),
    ("normalization", "layernorm", ("rmsnorm",)),
    ("layernorm_zero_centered_gamma", False, (False,)),
    ("activation", "gelu", ("fast-swiglu", "swiglu")),
    ("bias", True, (False,)),
    ("qkv_bias", False, (False,)),
    ("qk_layernorm", False, (False,)),
    ("window_size", None, (None,)),
    ("num_moe_experts", None, (None,)),
    ("position_embedding_type", "learned_absolute", ("rope",)),
    ("rotary_percentage", 1.0, (1.0,)),
    ("rotary_interleaved", False, (False,)),
    ("seq_len_interpolation_factor", None, (None,)),
    ("scale_positional_embedding", False, (False,)),
    ("apply_embedding_scaling", False, (False,)),
    ("mcore_customization_config", {}, ({},)),
)


class ExportedGPTModel(NLPAdapterModelMixin, ConvertedGPTModel):
    """The model in an archive, to which adapters can be added."""

    def __init__(self, cfg: DictConfig, trainer: Trainer):  # NeMo inspects the argument names
        super().__init__(cfg, trainer=trainer)


def export(
    archive_path: str | Path, output_path: str | Path, precision: str = "32", lora_path: str | Path | None = None
) -> None:
    """Write the language model in a `.nemo` archive, or the folder it was extracted to, as a Hugging Face folder.

    The folder appears at `output_path` once it is complete. `precision` ("32" or "bf16") is the dtype of the written
    weights. Any parallel layout of the training is supported. Memory holds the model in float32 and in that dtype.
    With `lora_path`, an archive of LoRA adapters trained on this model, the adapters are merged into it.

    Raises:
        ConfigError: the input is not a complete archive of a Llama with its tokenizer, the adapters do not belong to
            this model, or the output exists.
    """
    archive_path, output_path = Path(archive_path), Path(output_path)
    with opened(archive_path, key="--input", only={CONFIG_FILE}) as archive:
        cfg = archive.config()
    check_is_llama(cfg, archive_path)
    if lora_path is not None:
        lora_cfg = stored_lora_config(lora_path, key="--lora")
        check_same_model(lora_cfg, cfg, f"--lora: {lora_path}")
    if output_path.exists() and not (output_path.is_dir() and next(output_path.iterdir(), None) is None):
        raise ConfigError(f"--output: {output_path} exists already; give a new folder")
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_path.parent) as workspace:
        folder = Path(workspace, output_path.name)
        folder.mkdir()
        tokenizer = _copy_tokenizer(archive_path, cfg.tokenizer.files, folder)
        hf_config = llama_config(cfg, tokenizer)
        model = _restore(archive_path, cfg, hf_config, len(tokenizer))
        if lora_path is not None:
            with open_dict(model.cfg):
                model.cfg.peft = lora_cfg.peft
            add_adapters_(model, model.cfg, lora_path, key="--lora")
            merge_lora_(model)
        to_llama(model.get_model_module_list()[0], hf_config, PRECISIONS[precision]).save_pretrained(folder)
        if cfg.get("hf_generation_config") is not None:
            content = json.dumps(OmegaConf.to_container(cfg.hf_generation_config), indent=2)
            Path(folder, "generation_config.json").write_text(f"{content}\n", encoding="utf-8")
        folder.replace(output_path)


def check_is_llama(cfg: DictConfig, path: Path) -> None:
    """Refuse anything but a complete language model that `LlamaForCausalLM` can represent.

    Raises:
        ConfigError: naming the key of the model's config and its value.
    """
    kind = cfg.get("reward_model_type")
    if kind is not None:
        raise ConfigError(f"{path}: model.reward_model_type is {kind!r}: only language models can be exported")
    scheme = OmegaConf.select(cfg, "peft.peft_scheme") or "none"
    if scheme != "none":
        raise ConfigError(
            f"{path}: model.peft.peft_scheme is {scheme!r}: it holds adapters alone; give it as --lora, and the model "
            "they were trained on as --input"
        )
    for key, default, accepted in LLAMA_VALUES:
        value = cfg.get(key, default)
        if value not in accepted:
            raise ConfigError(f"{path}: model.{key} is {value!r}: a Llama needs {accepted[-1]!r}")
    files = OmegaConf.select(cfg, "tokenizer.files") or {}
    if not all(str(files.get(key)).startswith("nemo:") for key in FILES):
        raise ConfigError(
            f"{path}: model.tokenizer.files does not name files of the archive: only archives of models that "
            "convert_hf_to_nemo.py made carry their tokenizer"
        )


def llama_config(cfg: DictConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The Hugging Face config that describes the NeMo model config `cfg`; the inverse of `model_config`.

    Archives of older converters have no `hf_config`; the context length is then that of training, and the special
    tokens are the tokenizer's.
    """
    num_heads = cfg.num_attention_heads
    kept = {
        "max_position_embeddings": cfg.max_position_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **OmegaConf.to_container(cfg.get("hf_config") or OmegaConf.create()),
    }
    return LlamaConfig(
        architectures=[CAUSAL_LM],
        vocab_size=cfg.get("override_vocab_size") or len(tokenizer),
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.ffn_hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=cfg.get("num_query_groups") or num_heads,
        head_dim=cfg.get("kv_channels") or cfg.hidden_size // num_heads,
        initializer_range=cfg.get("init_method_std", 0.02),
        rms_norm_eps=cfg.get("layernorm_epsilon", 1e-5),
        rope_theta=cfg.get("rotary_base", 10000),
        tie_word_embeddings=cfg.get("share_embeddings_and_output_weights", True),
        **kept,
    )


@torch.no_grad()
def to_llama(gpt_model: torch.nn.Module, config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """Convert megatron-core's GPT model, on the CPU, to Hugging Face; the vocabulary is cut to `config.vocab_size`."""
    tensors = {}
    for name, parameter in gpt_model.named_parameters():
        names = hf_names(name)
        parts = unpack(parameter, len(names), config.num_attention_heads, config.num_key_value_heads)
        for hf_name, tensor in zip(names, parts, strict=True):
            if hf_name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensor = tensor[: config.vocab_size]
            # Copied, because safetensors refuses tensors that share memory.
            tensors[hf_name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama.load_state_dict(tensors, strict=True, assign=True)
    llama.tie_weights()
    return llama


def _restore(path: Path, cfg: DictConfig, hf_config: LlamaConfig, tokenizer_size: int) -> ExportedGPTModel:
    """The model in float32, with the archive's vocabulary size."""
    cpu.enable()
    restored_cfg = model_config(hf_config, cfg.tokenizer, precision="32")
    if cfg.get("override_vocab_size") is None:
        multiple = cfg.get("make_vocab_size_divisible_by", 128) * cfg.get("tensor_model_parallel_size", 1)
        restored_cfg.override_vocab_size = -(-tokenizer_size // multiple) * multiple
    return load_from_nemo(ExportedGPTModel, restored_cfg, cpu_trainer(), restore_path=str(path))


def _copy_tokenizer(archive_path: Path, files: DictConfig, folder: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer's files, which `files` names as members of the archive, to `folder`, and load them."""
    members = {key: files[key].removeprefix("nemo:") for key in FILES}
    with opened(archive_path, key="--input", only=set(members.values())) as archive:
        for key, file_name in FILES.items():
            shutil.copy(archive.folder / members[key], folder / file_name)
    return AutoTokenizer.from_pretrained(folder)
