"""A tiny Llama model with its own tokenizer, and the actor restored from it."""

from pathlib import Path

import torch
from omegaconf import OmegaConf, open_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
TEXTS = [
    "the quick brown fox jumps over the lazy dog and the dog sleeps in the sun",
    "a good answer is short and kind and it ends where it should",
    "one two three four five six seven eight nine ten",
]


def save_tiny_llama(folder: Path, seed: int = 0, model_class=LlamaForCausalLM, **config) -> Path:
    """Write a random Llama (4 layers, hidden 64, 4 heads in 2 groups) and a byte-level tokenizer to `folder`.

    The tokenizer has fewer entries than the model's vocabulary, as padded models do.
    """
    save_tokenizer(folder)
    tokenizer = _tiny_tokenizer()
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
        "tie_word_embeddings": True, "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    model_class(LlamaConfig(**{**defaults, **config})).save_pretrained(folder)
    return folder


def save_gpt2_like(tiny_hf: Path, path: Path, **overrides) -> Path:
    """Write a `.nemo` archive of a model with LayerNorm, learned positions, GELU and biases, all parameters random.

    `overrides` are keys of its config; the tokenizer is the one in `tiny_hf`.
    """
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
    from pytorch_lightning import Trainer
    from transformers import AutoConfig

    from nemo_aligner.convert.hf_to_nemo import ConvertedGPTModel, model_config
    from nemo_aligner.models.nlp.gpt.hf_tokenizer import tokenizer_config

    cfg = model_config(AutoConfig.from_pretrained(tiny_hf), tokenizer_config(tiny_hf), "32")
    defaults = {
        "normalization": "layernorm", "position_embedding_type": "learned_absolute", "activation": "gelu", "bias": True,
    }  # fmt: skip
    cfg.update({**defaults, **overrides})
    trainer = Trainer(devices=1, accelerator="cpu", strategy=NLPDDPStrategy(), logger=False, enable_checkpointing=False)
    destroy_num_microbatches_calculator()  # NeMo would insist on an earlier model's batch sizes
    model = ConvertedGPTModel(cfg, trainer)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.cfg.perform_initialization = True  # as the converter leaves it
    model.save_to(str(path))
    return path


def save_tokenizer(folder: Path) -> Path:
    _tiny_tokenizer().save_pretrained(folder)
    return folder


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def rs_config(**overrides) -> dict:
    """The section `model.rs` with greedy decoding of at most 16 tokens; `overrides` are dotted keys within it."""
    rs = OmegaConf.create(
        {
            "length_params": {"max_length": 16, "min_length": 0},
            "sampling_params": {
                "use_greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
                "add_BOS": False, "all_probs": False, "compute_logprob": False, "end_strings": [END],
            },
            "offload_adam_states": True,
            "forward_micro_batch_size": 1,
        }
    )  # fmt: skip
    for key, value in overrides.items():
        OmegaConf.update(rs, key, value, force_add=True)
    return rs


def load_actor(nemo_path: Path, world_size: int = 1, rs: dict | None = None, **model_overrides):
    """`MegatronGPTRSModel` on this process's device. In a process started by `run_ranks`, pass its `world_size`."""
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
    from pytorch_lightning import Trainer

    from nemo_aligner.compat import device
    from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
    from nemo_aligner.utils.utils import load_checkpoint_model_config, load_from_nemo

    cfg = load_checkpoint_model_config(str(nemo_path))
    with open_dict(cfg):
        cfg.rs = rs_config(**(rs or {}))
        cfg.use_cpu_initialization = device.on_cpu()
        for key, value in model_overrides.items():
            OmegaConf.update(cfg, key, value, force_add=True)
    trainer = Trainer(
        devices=world_size, num_nodes=1, accelerator="cpu" if device.on_cpu() else "gpu", strategy=NLPDDPStrategy(),
        logger=False, enable_checkpointing=False,
    )  # fmt: skip
    return load_from_nemo(MegatronGPTRSModel, cfg, trainer, restore_path=str(nemo_path))


def prompt_batch(rows: list[list[int]], eos_id: int, max_length: int) -> dict[str, torch.Tensor]:
    """Input for `infer`: ragged prompts, right-padded, with room for `max_length` tokens."""
    width = max(map(len, rows)) + max_length
    text = torch.full((len(rows), width), eos_id)
    for row, ids in zip(text, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return {"text": text, "length": torch.tensor([len(ids) for ids in rows])}
