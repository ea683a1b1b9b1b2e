"""Names and shapes of a checkpoint's weights, read from its metadata without loading a tensor or running its code."""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

from nemo_aligner.compat.checkpoint_pickles import (
    PartOfFile,
    PickleRefused,
    Record,
    check_object,
    read_pickle,
    read_torch_file,
)
from nemo_aligner.utils.errors import ConfigError

FOLDER, FILE = "model_weights", "model_weights.ckpt"
RANK_FOLDERS = re.compile(r"mp_rank_\d{2}|tp_rank_\d{2}_pp_rank_\d{3}")
FORMATS = ("torch_dist", "zarr")

_DEFAULT_VERSIONS = {"sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_LARGEST_DESCRIPTION = 2**28
_ZARR_DTYPE = re.compile(r"bfloat16|[<|][biuf]([1248])")
_LAYER = re.compile(r"(?:.*\.)?decoder\.layers\.(?:(\d+)\.)?self_attention\.linear_proj\.weight")
_EMBEDDING = re.compile(r"(?:.*\.)?embedding\.word_embeddings\.weight")


@dataclass
class Weights:
    """`format` is one of FORMATS, or None for files that `torch.save` wrote. `shapes`: name -> shape of the whole
    tensor, empty for files of several ranks. `objects`: names of the objects stored alongside the tensors."""

    format: str | None
    shapes: dict[str, tuple[int, ...]]
    objects: set[str]

    def embedding_rows(self) -> int | None:
        return next((shape[0] for name, shape in self.shapes.items() if _EMBEDDING.fullmatch(name)), None)


def read_weights(folder: Path) -> Weights:
    """Describe, and check, the weights in an extracted archive.

    Every pickle is checked here before anything else may load it; every file that holds a part of a tensor must exist
    and have the length that the metadata says.

    Raises:
        ConfigError: naming the member, relative to `folder`, and what is wrong with it.
    """
    files = _files_of_ranks(folder) + ([folder / FILE] if (folder / FILE).exists() else [])
    if (folder / FOLDER).exists():
        if files:  # NeMo would load the file
            raise ConfigError(f"it has two kinds of weights, {FOLDER} and {_member(files[0])}")
        return _read_distributed(folder / FOLDER)
    if len({file.parent == folder for file in files}) != 1:
        raise ConfigError(f"it has neither just {FOLDER} nor just {FILE} nor just {FILE} of each rank")
    contents = [_described(file) for file in files]
    shapes = _shapes_in(contents[0], files[0]) if files == [folder / FILE] else {}
    return Weights(None, shapes, set())


def check_weight_sizes(weights: Weights, cfg) -> None:
    """Refuse a config whose `num_layers` or `hidden_size` do not match the weights.

    Raises:
        ConfigError: naming the parameter, its shape and the key.
    """
    for key in ("num_layers", "hidden_size"):
        if cfg.get(key) is None:
            raise ConfigError(f"the model's config has no {key}")
    layers = {}
    for name, shape in weights.shapes.items():
        if _EMBEDDING.fullmatch(name):
            _require(shape[-1] == cfg.hidden_size, name, shape, f"hidden_size={cfg.hidden_size}")
        elif found := _LAYER.fullmatch(name):
            layers[name] = found[1]
            if found[1] is None:  # layers of one kind are stored as one tensor
                _require(shape[0] == cfg.num_layers, name, shape, f"num_layers={cfg.num_layers}")
            _require(cfg.hidden_size in shape, name, shape, f"hidden_size={cfg.hidden_size}")
    if layers and None not in layers.values() and len(layers) != cfg.num_layers:
        raise ConfigError(f"the weights have {len(layers)} layers, but the config says num_layers={cfg.num_layers}")


def check_model(weights: Weights, model, strict: bool, may_hold_more: bool = False) -> None:
    """Refuse weights that do not match a model, before they are loaded into it. Collective over all ranks.

    Args:
        model: a NeMo GPT model; with a distributed checkpoint, in an initialised process group.
        strict: whether a distributed checkpoint must hold no tensors beyond the model's parameters, as a single file
            always must. Neither may ever hold fewer: NeMo cannot load them.
        may_hold_more: whether they may hold more nevertheless.

    Raises:
        ConfigError: on every rank, naming the first parameter that does not fit and why.
    """
    if not weights.shapes:
        return
    wanted, resizable, objects = _wanted_by(model) if weights.format else _state_of(model)
    problems = _vocabulary_problems(weights, model)
    for name, shape in wanted.items():
        stored = weights.shapes.get(name)
        if stored is None:
            problems.append(f"the parameter {name} is missing from the weights")
        elif stored[1:] != shape[1:] if name in resizable else stored != shape:
            problems.append(f"the parameter {name} has the shape {stored} in the weights, but {shape} in the model")
    if strict:
        problems += [f"the object {name} is missing from the weights" for name in sorted(objects - weights.objects)]
    of_ranks = [(problems, set(wanted))]
    if torch.distributed.is_initialized():
        of_ranks *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, (problems, set(wanted)))
    unknown = set(weights.shapes).difference(*(names for _, names in of_ranks))
    problems = list(dict.fromkeys(problem for problems, _ in of_ranks for problem in problems))
    if (strict or weights.format is None) and not may_hold_more:
        problems += [
            f"the weights hold the parameter {name}, which the model does not have" for name in sorted(unknown)
        ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0]}{more}; are config, tokenizer and weights those of one model?")


def _wanted_by(model) -> tuple[dict[str, tuple], set[str], set[str]]:
    """Name -> shape of the tensors that a rank requests from a distributed checkpoint, the names of those whose first
    dimension may differ (vocabularies are padded for the number of ranks), and the names of objects."""
    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    wanted = list(nested_values(sharded))
    tensors = [entry for entry in wanted if isinstance(entry, ShardedTensor)]
    return (
        {tensor.key: tuple(tensor.global_shape) for tensor in tensors},
        {tensor.key for tensor in tensors if tensor.allow_shape_mismatch},
        {entry.unique_key for entry in wanted if isinstance(entry, ShardedObject)},
    )


def _state_of(model) -> tuple[dict[str, tuple], set[str], set[str]]:
    """Like `_wanted_by`, for a file that holds the state of the whole model."""
    state = model.state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}, set(), set()


def _vocabulary_problems(weights: Weights, model) -> list[str]:
    """Problems if the embedding table in the weights does not match the model's tokenizer."""
    rows, entries = weights.embedding_rows(), model.tokenizer.vocab_size
    if rows is None:
        return []
    if entries > rows:
        return [f"the tokenizer has {entries} entries, but the embedding table in the weights only {rows} rows"]
    if model.cfg.get("override_vocab_size") is not None:
        expected = {model.cfg.override_vocab_size}
    else:  # padded to a multiple that depends on how many tensor-parallel ranks wrote the weights
        multiples = [model.cfg.get("make_vocab_size_divisible_by", 128) * 2**power for power in range(8)]
        expected = {math.ceil(entries / multiple) * multiple for multiple in multiples}
    if rows in expected:
        return []
    return [f"the tokenizer's {entries} entries need {min(expected)} rows, but the weights' embedding table has {rows}"]


def _require(fits: bool, name: str, shape: tuple, setting: str) -> None:
    if not fits:
        raise ConfigError(f"the parameter {name} has the shape {shape}, which does not fit the config's {setting}")


def _files_of_ranks(folder: Path) -> list[Path]:
    folders = [entry for entry in sorted(folder.iterdir()) if RANK_FOLDERS.fullmatch(entry.name)]
    for entry in folders:
        if not (entry / FILE).is_file():
            raise ConfigError(f"{entry.name}/{FILE} is missing")
    return [entry / FILE for entry in folders]


def _described(file: Path):
    """The records of a file written by `torch.save`."""
    with file.open("rb") as opened, _naming(_member(file)):
        return read_torch_file(opened)


def _content(file: Path) -> bytes:
    """The bytes of a file with metadata of tensors or with objects."""
    if not file.is_file():
        raise ConfigError(f"{_member(file)} is missing")
    if file.stat().st_size > _LARGEST_DESCRIPTION:
        raise ConfigError(f"{_member(file)} has {file.stat().st_size} bytes, which is too many")
    return file.read_bytes()


@contextlib.contextmanager
def _naming(member: str) -> Iterator[None]:
    try:
        yield
    except PickleRefused as error:
        raise ConfigError(f"{member}: {error}") from error


def _member(path: Path) -> str:
    """The name of a weights file within the archive."""
    parts = path.parts
    start = next(
        (i for i in reversed(range(len(parts) - 1)) if parts[i] == FOLDER or RANK_FOLDERS.fullmatch(parts[i])), -1
    )
    return "/".join(parts[start:])


# ---- distributed checkpoints


def _read_distributed(folder: Path) -> Weights:
    described = {**_DEFAULT_VERSIONS, **_read_json(folder / "metadata.json")}
    kind = described.pop("sharded_backend", None)
    if kind not in FORMATS:
        raise ConfigError(f"{FOLDER}/metadata.json: sharded_backend={kind!r} is none of {' or '.join(FORMATS)}")
    if described != _DEFAULT_VERSIONS:
        raise ConfigError(f"{FOLDER}/metadata.json: {described} is a version that is not supported")
    if not (folder / "common.pt").is_file():
        raise ConfigError(f"{FOLDER}/common.pt is missing")
    _described(folder / "common.pt")
    if (folder / "modelopt_state").exists():
        raise ConfigError(f"{FOLDER}/modelopt_state: weights quantized by modelopt are not supported")
    shapes, objects = _read_torch_dist(folder) if kind == "torch_dist" else _read_zarr(folder)
    if not shapes:
        raise ConfigError(f"{FOLDER} holds no tensors")
    return Weights(kind, shapes, objects)


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(_content(file))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{_member(file)} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{_member(file)} holds a {type(content).__name__}, not an object")
    return content


def _read_torch_dist(folder: Path) -> tuple[dict, set]:
    """Shapes of tensors and names of objects from `.metadata`; all their parts must exist."""
    with _naming(f"{FOLDER}/.metadata"):
        metadata = read_pickle(_content(folder / ".metadata"))
    shapes, parts = {}, {}  # parts: (name, offsets) -> sizes; for an object (name, None) -> None
    try:
        for name, entry in metadata.state["state_dict_metadata"].items():
            if type(entry).__name__ == "BytesStorageMetadata":
                parts[name, None] = None
                continue
            shapes[name] = _numbers(entry.state["size"])
            chunks = [
                (_numbers(chunk.state["offsets"]), _numbers(chunk.state["sizes"])) for chunk in entry.state["chunks"]
            ]
            parts |= {(name, offsets): sizes for offsets, sizes in chunks}
            if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(shapes[name]):
                raise TypeError(f"the parts of {name} do not make up its shape {shapes[name]}")
        places = {}
        for index, place in metadata.state["storage_data"].items():
            offsets = index.state.get("offset")
            places[index.state["fqn"], None if offsets is None else _numbers(offsets)] = place.state
        if missing := parts.keys() - places.keys():
            raise TypeError(f"it does not say where {min(missing, key=str)[0]} is stored")
        for part, place in places.items():
            if part in parts:
                _check_part(folder, part[0], place, parts[part])
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{FOLDER}/.metadata is damaged ({type(error).__name__}: {error})") from error
    return shapes, {name for name, _ in parts} - set(shapes)


def _numbers(size: Record) -> tuple[int, ...]:
    """The sizes in a torch.Size."""
    if type(size).__name__ != "Size" or not _are_sizes(list(size.args[0])):
        raise TypeError(f"{size!r} is no size")
    return tuple(size.args[0])


def _check_part(folder: Path, name: str, place: dict, sizes: tuple[int, ...] | None) -> None:
    """Refuse a part (a tensor of these sizes, or an object) that is not where `.metadata` says."""
    file, offset, length = place["relative_path"], place["offset"], place["length"]
    if not isinstance(file, str) or not _are_sizes([offset, length]) or place.get("transform_descriptors"):
        raise TypeError(f"{name} is stored as {place!r}")
    if Path(file).name != file or not (folder / file).is_file():
        raise ConfigError(f"{FOLDER}/{file} is missing, where {name} should be")
    if offset + length > (folder / file).stat().st_size:
        raise ConfigError(f"{FOLDER}/{file} ends before {name}, which should be at bytes {offset} to {offset + length}")
    with (folder / file).open("rb") as opened, _naming(f"{FOLDER}/{file}, {name}"):
        part = PartOfFile(opened, offset, length)
        if sizes is None:
            if length > _LARGEST_DESCRIPTION:
                raise PickleRefused(f"it has {length} bytes, which is too many")
            check_object(part.read())
        elif _tensor_shape(tensor := read_torch_file(part)) != sizes:
            raise PickleRefused(f"it is {tensor!r}, not a tensor of shape {sizes}")


def _read_zarr(folder: Path) -> tuple[dict, set]:
    """Shapes of tensors from their folders' `.zarray`, and names of the objects stored alongside."""
    shapes, objects = {}, set()
    for entry in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (entry / ".zarray").is_file():
            shapes[entry.name] = _check_array(entry)
        for file in entry.glob("*.pt"):
            with _naming(_member(file)):
                check_object(_content(file))
            objects.add(f"{entry.name}/{file.stem}")
    return shapes, objects


def _check_array(folder: Path) -> tuple[int, ...]:
    """The shape of a zarr array that can be read without a codec (some run pickles) and has all its chunks."""
    described = _read_json(folder / ".zarray")
    shape, chunks, dtype = (described.get(key) for key in ("shape", "chunks", "dtype"))
    if described.get("compressor") or described.get("filters") or described.get("dimension_separator", ".") != ".":
        raise ConfigError(f"{_member(folder)}/.zarray: arrays with codecs, or in folders, are not supported")
    if not isinstance(dtype, str) or not (known := _ZARR_DTYPE.fullmatch(dtype)):
        raise ConfigError(f"{_member(folder)}/.zarray: the dtype {dtype!r} is not one of numbers")
    if not _are_sizes(shape) or not _are_sizes(chunks) or len(shape) != len(chunks) or 0 in chunks:
        raise ConfigError(f"{_member(folder)}/.zarray: shape={shape!r} and chunks={chunks!r} are no sizes")
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    present = {file.name: file.stat().st_size for file in folder.iterdir() if not file.name.startswith(".")}
    if math.prod(counts) > len(present) + 1000:
        raise ConfigError(f"{_member(folder)} has {len(present)} files, but .zarray describes {math.prod(counts)}")
    size = math.prod(chunks) * int(known[1] or 2)
    for name in _chunk_names(counts):
        if present.get(name) != size:
            what = "is missing" if name not in present else f"has {present[name]} bytes, not {size}"
            raise ConfigError(f"{_member(folder)}/{name} {what}")
    return tuple(shape)


def _are_sizes(value) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _chunk_names(counts: list[int]) -> Iterator[str]:
    ranges = [] if 0 in counts else map(range, counts)
    return (".".join(map(str, index)) or "0" for index in itertools.product(*ranges))


# ---- files of torch.save


def _shapes_in(content, file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a state dict's tensors."""
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"{_member(file)} does not hold a dictionary of parameters")
    shapes = {name: _tensor_shape(value) for name, value in content.items()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _tensor_shape(record) -> tuple[int, ...] | None:
    """The shape of a tensor or parameter according to its record; None for anything else."""
    if type(record).__name__ == "_rebuild_parameter" and record.args:
        record = record.args[0]
    if type(record).__name__ not in ("_rebuild_tensor_v2", "_rebuild_tensor_v3") or len(record.args) < 4:
        return None
    return record.args[2] if isinstance(record.args[2], tuple) and _are_sizes(list(record.args[2])) else None
