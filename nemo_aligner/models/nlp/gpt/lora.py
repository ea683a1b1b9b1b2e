"""LoRA adapters of a GPT model: adding them, sharding for megatron-core's checkpoints, loading from `.nemo` archives.

An archive of adapters has NeMo's format: their config, and one weights file for each model-parallel rank of the run
that wrote it. They can be restored in any other parallel layout: the shards are joined and split again.

Shapes: linear_in [R, I] and linear_out [O, R] with rank R, of a layer with weight [O, I].
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import AdapterName
from nemo.collections.nlp.parts.peft_config import LoraPEFTConfig
from omegaconf import DictConfig

from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.nemo_archive import naming, opened
from nemo_aligner.utils.nemo_weights import FILE, RANK_FOLDERS, read_weights
from nemo_aligner.utils.peft_checks import PEFT_KEY, check_is_lora

# NeMo's name of an adapter -> the layer in the same module to whose output the adapter's is added
LINEARS = {
    "lora_kqv_adapter": "linear_qkv",
    "lora_dense_attention_adapter": "linear_proj",
    "lora_hto4h_adapter": "linear_fc1",
    "lora_4htoh_adapter": "linear_fc2",
}
# Their input is split over the tensor-parallel ranks.
_ROW_PARALLEL = ("lora_dense_attention_adapter", "lora_4htoh_adapter")
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclass
class Adapter:
    """One adapter of this rank.

    `prefix` is its prefix in its chunk's state dict; in `whole_prefix` layers are numbered from the first stage.
    `chunk` is the index of its virtual stage on this rank, 0 without virtual stages. `parent` is the attention or MLP
    module that calls it, `linear` the layer in it to whose output the adapter's is added.
    """

    chunk: int
    prefix: str
    whole_prefix: str
    name: str
    module: torch.nn.Module
    parent: torch.nn.Module

    @property
    def linear(self) -> torch.nn.Module:
        return getattr(self.parent, LINEARS[self.name])


def add_adapters_(model, cfg: DictConfig, restore_from_path: str | None = None, key: str = PEFT_KEY) -> None:
    """Freeze the model and add adapters as configured in `cfg.peft.lora_tuning`, new or with weights from an archive.

    Raises:
        ConfigError: naming `key` and the archive, if it does not hold these adapters.
    """
    model.add_adapter(LoraPEFTConfig(cfg))
    is_first_stage = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    if cfg.get("activations_checkpoint_granularity") == "full" and is_first_stage:
        # Recomputation needs an input that requires a gradient; the output of a frozen embedding does not.
        model.get_model_module_list()[0].embedding.register_forward_hook(_require_gradient)
    if restore_from_path is not None:
        load_adapters_(model, restore_from_path, key)


def adapters_of(model) -> Iterator[Adapter]:
    """The adapters in this rank's layers."""
    for chunk, gpt_model in enumerate(model.get_model_module_list()):
        for index, layer in enumerate(gpt_model.decoder.layers):
            for path, parent in layer.named_modules():
                for key, module in getattr(parent, "adapter_layer", {}).items():
                    name = AdapterName(key).value
                    here, whole = (
                        f"model.decoder.layers.{number}.{path}.adapter_layer.{name}."
                        for number in (index, layer.layer_number - 1)
                    )
                    yield Adapter(chunk, here, whole, name, module, parent)


def adapter_state(model) -> dict:
    """This rank's adapter weights by name; with virtual stages one dict for each of them, as in NeMo."""
    chunks = [{} for _ in model.get_model_module_list()]
    for adapter in adapters_of(model):
        chunks[adapter.chunk].update(
            (adapter.prefix + name, weight.detach()) for name, weight in adapter.module.named_parameters()
        )
    return _by_virtual_stage(chunks)


def sharded_adapters(model) -> ShardedStateDict:
    """Sharded state dict of this rank's adapters, for megatron-core's distributed checkpoints."""
    chunks = [{} for _ in model.get_model_module_list()]
    for adapter in adapters_of(model):
        parts = adapter.module.sharded_state_dict(adapter.prefix)
        parts = {name: part for name, part in parts.items() if not name.endswith("_extra_state")}
        for name in parts:
            if _is_gated(name, model.cfg):
                parts[name] = apply_swiglu_sharded_factory(parts[name], ())
        replace_prefix_for_sharding(parts, adapter.prefix, adapter.whole_prefix)
        chunks[adapter.chunk].update(parts)
    return _by_virtual_stage(chunks)


def _by_virtual_stage(chunks: list[dict]) -> dict:
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is None:
        return chunks[0]
    return {f"model_{number}": chunk for number, chunk in enumerate(chunks)}


@torch.no_grad()
def load_adapters_(model, path: str | Path, key: str = PEFT_KEY) -> None:
    """Load adapter weights from an archive, possibly written in another parallel layout.

    Raises:
        ConfigError: naming `key`, the archive, and the first parameter that is missing, unexpected or of another shape.
    """
    stored = read_adapters(path, key)
    rank = parallel_state.get_tensor_model_parallel_rank()
    num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    layers, names = set(), set()
    with naming(f"{key}: {path}"):
        for adapter in adapters_of(model):
            layers.add(_layer_of(adapter.whole_prefix))
            for suffix, parameter in adapter.module.named_parameters():
                name = adapter.whole_prefix + suffix
                names.add(name)
                if name not in stored:
                    raise ConfigError(f"the parameter {name} is missing")
                shard = _split(stored[name], name, num_ranks, model.cfg)[rank]
                if shard.shape != parameter.shape:
                    raise ConfigError(
                        f"the parameter {name} has the shape {tuple(stored[name].shape)}, of which "
                        f"{tuple(shard.shape)} would be here, but the model has {tuple(parameter.shape)}"
                    )
                parameter.copy_(shard)
        superfluous = sorted(name for name in stored if name not in names and _layer_of(name) in layers)
        if superfluous:
            raise ConfigError(f"the parameter {superfluous[0]} has no place in the model")


def read_adapters(path: str | Path, key: str = PEFT_KEY) -> dict[str, torch.Tensor]:
    """Name -> unsharded tensor of the adapters in an archive, on the CPU; layers are numbered from the first stage.

    Raises:
        ConfigError: naming `key` and the archive, if it is damaged or does not hold LoRA adapters.
    """
    shards = {}
    with opened(path, key) as archive:
        cfg = archive.config()
        with naming(archive.where):
            check_is_lora(cfg)
            if read_weights(archive.folder).format is not None:
                raise ConfigError("its weights are a distributed checkpoint, not files of adapters")
        files = {_rank_of(file): file for file in archive.folder.rglob(FILE)}
        num_stages = len({stage for stage, _ in files})
        for (stage, _), file in sorted(files.items()):
            state = torch.load(file, map_location="cpu", weights_only=True)
            chunks = [state[f"model_{number}"] for number in range(len(state))] if "model_0" in state else [state]
            layers_per_chunk = cfg.num_layers // (num_stages * len(chunks))
            for chunk, weights in enumerate(chunks):
                first_layer = (chunk * num_stages + stage) * layers_per_chunk
                for name, tensor in weights.items():
                    shards.setdefault(_shift_layer(name, first_layer), []).append(tensor)
    return {name: _join(parts, name, cfg) for name, parts in shards.items()}


def _require_gradient(module, args, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


# ---- names


def _layer_of(name: str) -> int:
    return int(_LAYER.search(name)[0])


def _shift_layer(name: str, distance: int) -> str:
    return _LAYER.sub(lambda found: str(int(found[0]) + distance), name)


def _rank_of(file: Path) -> tuple[int, int]:
    """Pipeline and tensor-parallel rank that wrote a file."""
    if not RANK_FOLDERS.fullmatch(file.parent.name):
        return 0, 0
    tensor_rank, *stage = map(int, re.findall(r"\d+", file.parent.name))
    return (*stage, 0)[0], tensor_rank


# ---- shards of tensor-parallel ranks


def _join(shards: list[torch.Tensor], name: str, cfg: DictConfig) -> torch.Tensor:
    if _is_gated(name, cfg):
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat(gates + ups)
    return torch.cat(shards, dim=_axis(name))


def _split(whole: torch.Tensor, name: str, num_ranks: int, cfg: DictConfig) -> list[torch.Tensor]:
    """The inverse of `_join`; the parts have unequal shapes if the tensor does not split evenly."""
    if _is_gated(name, cfg):
        gate, up = whole.chunk(2)
        return [torch.cat(halves) for halves in zip(gate.chunk(num_ranks), up.chunk(num_ranks), strict=True)]
    return list(whole.chunk(num_ranks, dim=_axis(name)))


def _axis(name: str) -> int:
    return int("linear_in" in name and any(adapter in name for adapter in _ROW_PARALLEL))


def _is_gated(name: str, cfg: DictConfig) -> bool:
    """Whether its rows are a gate and an up projection, each of which is split over the ranks."""
    return "lora_hto4h_adapter.linear_out" in name and str(cfg.get("activation")).endswith("glu")
