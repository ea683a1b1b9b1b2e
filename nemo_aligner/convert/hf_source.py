"""Reads a Hugging Face model tensor by tensor, from a folder of safetensors or .bin files, or from a GGUF file."""

import contextlib
import json
import pickle
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from nemo_aligner.utils.server_utils import one_line

CAUSAL_LM, SEQUENCE_CLASSIFICATION = "LlamaForCausalLM", "LlamaForSequenceClassification"
# Hugging Face name -> llama.cpp's name of the same tensor; {i} is the layer.
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


class HFFolder:
    """A model folder as `save_pretrained` writes it. Weights are loaded lazily.

    Attributes:
        generation_config: contents of `generation_config.json`, None if there is no such file.
    """

    def __init__(self, path: Path):
        """Raises ValueError, in one line, for a file that is missing or broken."""
        self.path = path
        self.config = _load_config(path)
        self.generation_config = _read_json(path / "generation_config.json")
        self.tokenizer = _load_tokenizer(path)
        self._file_of = _weight_index(path)
        self._open_files = {}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that Hugging Face name, in the dtype it is stored in.

        Raises:
            ValueError: if the folder has no such tensor, or its file is incomplete.
        """
        if name not in self._file_of:
            raise ValueError(f"{self.path}: the checkpoint has no tensor {name!r}")
        file = self.path / self._file_of[name]
        if file.suffix == ".safetensors":
            with _opened_safetensors(file) as weights:
                return weights.get_tensor(name)
        if file not in self._open_files:
            self._open_files[file] = _load_torch_file(file)
        return self._open_files[file][name]

    def tensors_beside(self, names: set[str]) -> list[str]:
        """Tensors of the folder that are not in `names`, except tables that follow from the config."""
        return sorted(name for name in set(self._file_of) - names if not name.endswith("rotary_emb.inv_freq"))


class GGUFFile:
    """A Llama model in llama.cpp's format. Tensors are dequantized to float32 on access."""

    generation_config = None

    def __init__(self, path: Path):
        from gguf import GGUFReader

        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (IndexError, ValueError) as error:
            raise ValueError(one_line(f"{path}: not a whole GGUF file ({error}); copy it again")) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path}: GGUF architecture {architecture!r} is not supported; only 'llama' is")
        self.config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        self.config.architectures = [CAUSAL_LM]
        self.config.tie_word_embeddings = "output.weight" not in self._tensors
        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        self._restore_special_tokens()

    def tensor(self, name: str) -> torch.Tensor:
        """The float32 tensor of that Hugging Face name.

        Raises:
            ValueError: if the file has no such tensor.
        """
        from gguf import dequantize

        gguf_name = _gguf_name(name)
        if gguf_name not in self._tensors:
            raise ValueError(f"{self.path}: the file has no tensor {gguf_name!r} (for {name!r})")
        stored = self._tensors[gguf_name]
        tensor = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        if name.endswith("q_proj.weight"):
            return _unpermute_heads(tensor, self.config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return _unpermute_heads(tensor, self.config.num_key_value_heads)
        return tensor

    def tensors_beside(self, names: set[str]) -> list[str]:
        """Tensors of the file that are not in `names` (Hugging Face names)."""
        return sorted(set(self._tensors) - set(map(_gguf_name, names)))

    def _restore_special_tokens(self) -> None:
        """transformers 4.49 infers special tokens from the vocabulary's order instead of the ids in the file."""
        for role in ("bos", "eos"):
            token_id = self._field(f"tokenizer.ggml.{role}_token_id")
            setattr(self.tokenizer, f"{role}_token", self.tokenizer.convert_ids_to_tokens(token_id))
            setattr(self.config, f"{role}_token_id", token_id)

    def _field(self, key: str):
        field = self._reader.get_field(key)
        if field is None:
            raise ValueError(f"{self.path}: the file has no metadata {key!r}")
        return field.contents()


def open_source(path: str | Path) -> HFFolder | GGUFFile:
    """Open a model folder or a `.gguf` file for reading.

    Raises:
        ValueError: if the path is neither, naming it and what is missing.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path}: not a GGUF file; give a GGUF file or a Hugging Face model folder")
        return GGUFFile(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give a GGUF file or a Hugging Face model folder")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no config.json in it; give the folder that save_pretrained wrote")
    return HFFolder(path)


def require_fast_tokenizer(tokenizer) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {type(tokenizer).__name__} has no tokenizer.json form; convert it to a fast one")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token, so no response could ever end")
    return tokenizer


def check_config(config: PretrainedConfig, path: str | Path) -> None:
    """Refuse a model that megatron-core's GPTModel, or the layout this converter writes, cannot represent.

    Raises:
        ValueError: naming the setting of the model's config and its value.
    """
    architecture = (config.architectures or ["unknown"])[0]
    scaling = getattr(config, "rope_scaling", None)
    checks = (
        (
            architecture in (CAUSAL_LM, SEQUENCE_CLASSIFICATION),
            "architectures",
            architecture,
            f"only {CAUSAL_LM} and {SEQUENCE_CLASSIFICATION} (a reward model) are supported",
        ),
        (
            not scaling or scaling.get("rope_type", scaling.get("type")) == "default",
            "rope_scaling",
            scaling,
            "RoPE scaling is not supported",
        ),
        (config.hidden_act == "silu", "hidden_act", config.hidden_act, "only silu (SwiGLU) is supported"),
        (not config.attention_bias, "attention_bias", config.attention_bias, "attention biases are not supported"),
        (not config.mlp_bias, "mlp_bias", config.mlp_bias, "MLP biases are not supported"),
        (
            getattr(config, "quantization_config", None) is None,
            "quantization_config",
            "...",
            "dequantize the model first",
        ),
    )
    for holds, key, value, reason in checks:
        if not holds:
            raise ValueError(f"{path}: {key} is {value!r}: {reason}")


def _load_config(path: Path) -> PretrainedConfig:
    _read_json(path / "config.json")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(one_line(f"{path / 'config.json'}: {error}")) from error


def _load_tokenizer(path: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _read_json(path / name)
    try:
        return AutoTokenizer.from_pretrained(path, use_fast=True)
    except (OSError, ValueError) as error:
        files = "copy tokenizer.json and tokenizer_config.json into it"
        raise ValueError(f"{path}: no tokenizer in it that transformers can load; {files}") from error


def _read_json(path: Path) -> dict | None:
    """The object in a JSON file, None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__}, not an object; copy the file again")
    return content


@contextlib.contextmanager
def _opened_safetensors(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (OSError, SafetensorError) as error:
        raise ValueError(one_line(f"{file}: not a whole safetensors file ({error}); copy it again")) from error


def _load_torch_file(file: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file}: not a whole file of tensors; copy it again") from error


def _weight_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, for one weight file or a sharded set."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        content = _read_json(path / index)
        if content is not None and not isinstance(content.get("weight_map"), dict):
            raise ValueError(f"{path / index}: no weight_map in it; copy the file again")
        if content is not None:
            return content["weight_map"]
    if (path / "model.safetensors").is_file():
        with _opened_safetensors(path / "model.safetensors") as weights:
            return dict.fromkeys(weights.keys(), "model.safetensors")
    if (path / "pytorch_model.bin").is_file():
        return dict.fromkeys(_load_torch_file(path / "pytorch_model.bin"), "pytorch_model.bin")
    raise ValueError(f"{path}: no weights in it (model.safetensors, pytorch_model.bin or an index of either)")


def _gguf_name(hf_name: str) -> str:
    if not hf_name.startswith("model.layers."):
        return GGUF_NAMES[hf_name]
    layer, rest = hf_name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[rest]}"


def _unpermute_heads(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of a [heads * D, H] projection.

    llama.cpp rotates neighbouring channels (0, 1), (2, 3), ...; Hugging Face rotates channel d with channel d + D/2. So
    llama.cpp's converter interleaves the two halves of each head, and this undoes it.
    """
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
