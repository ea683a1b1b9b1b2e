"""Builds prompt datasets, dataloaders and collate functions from the configuration."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset
from nemo.utils import logging
from torch.utils.data import DataLoader, Dataset

from nemo_aligner.compat import device
from nemo_aligner.data.nlp.datasets import BlendedDataset, RLHFDataset
from nemo_aligner.data.nlp.prompts import PromptFile
from nemo_aligner.data.nlp.samplers import RandomBatchSampler, SequentialBatchSampler

SPLITS = ("train", "validation", "test")


# ---- datasets


def build_train_valid_test_datasets(
    cls,
    cfg,
    data_prefix,
    data_impl,
    splits_string,
    train_valid_test_num_samples,
    seq_length,
    seed,
    tokenizer,
    n_chunks=None,
    n_examples_per_chunk=None,
):
    """The (train, validation, test) datasets of class `cls`.

    Args:
        cfg: the model section of the configuration
        data_prefix: files, in one of two forms. A mapping has a list of files under each of train, validation and test;
            further keys that begin with "validation" make the second result a dict of datasets by key. A list of files
            is split by `splits_string`, and an empty split is None. A list is `[path]`, or
            `[weight, path, weight, path, ...]` to blend.
        data_impl: "json" or "jsonl" for prompt files; "mmap" for the path prefixes of indexed token files
        splits_string: relative sizes of the three splits, such as "98,1,1" or "98/1/1"; for the list form only
        train_valid_test_num_samples: a negative count uses all prompts. A positive count takes that many from the
            beginning of a file; a blend is built to that size, repeating files if its weights require it.

    Raises:
        AssertionError: a mapping lacks one of the three keys or has nothing under it
        NotImplementedError: a mapping has another key, or chunks are requested
        RuntimeError: another `data_impl`
        ValueError: files, weights, counts or the splits string are unusable
    """
    _refuse_chunks(n_chunks, n_examples_per_chunk)
    num_samples = dict(zip(SPLITS, train_valid_test_num_samples, strict=True))
    build = partial(_build_dataset, cls, cfg, seq_length=seq_length, seed=seed, tokenizer=tokenizer)
    if not isinstance(data_prefix, Mapping):
        parts = _open_parts(data_prefix, data_impl)
        splits = [split_rows(splits_string, len(part.rows)) for part in parts]
        return tuple(
            build(
                [replace(part, documents=split[i]) for part, split in zip(parts, splits, strict=True)],
                num_samples=num_samples[name],
                name=name,
            )
            for i, name in enumerate(SPLITS)
        )
    _check_split_names(data_prefix)
    if splits_string is not None:
        logging.warning("model.data.splits_string is ignored, because model.data.data_prefix names each split's files")
    datasets = {
        name: build(_open_parts(files, data_impl), num_samples=num_samples[_split_of(name)], name=name)
        for name, files in data_prefix.items()
    }
    validation = {name: dataset for name, dataset in datasets.items() if _split_of(name) == "validation"}
    return datasets["train"], validation if len(validation) > 1 else datasets["validation"], datasets["test"]


build_train_valid_test_rlhf_datasets = partial(build_train_valid_test_datasets, RLHFDataset)


def build_dataset_generic(
    cls,
    cfg,
    data_prefix,
    data_impl,
    num_samples,
    seq_length,
    seed,
    tokenizer,
    name,
    n_chunks=None,
    n_examples_per_chunk=None,
):
    """One dataset of class `cls` over a list of files; `name` is its key in the mapping form of `data_prefix`.

    Arguments and errors as in `build_train_valid_test_datasets`.
    """
    _refuse_chunks(n_chunks, n_examples_per_chunk)
    return _build_dataset(cls, cfg, _open_parts(data_prefix, data_impl), num_samples, seq_length, seed, tokenizer, name)


def check_prompt_files(data_prefix, data_impl: str) -> dict[str, int]:
    """Check every file of the configuration without a tokenizer, before a model is loaded.

    Returns the number of prompts by path. Errors as in `build_train_valid_test_datasets`.
    """
    if isinstance(data_prefix, Mapping):
        _check_split_names(data_prefix)
        file_lists = list(data_prefix.values())
    else:
        file_lists = [data_prefix]
    paths = dict.fromkeys(path for files in file_lists for _, path in _weights_and_paths(files))
    return {path: len(_open_rows(path, data_impl)) for path in paths}


def split_rows(splits_string: str | None, num_rows: int) -> list[np.ndarray]:
    """Split rows 0 ... num_rows - 1 into three contiguous pieces in the proportions of a string such as "98,1,1"."""
    try:
        shares = [float(share) for share in str(splits_string).replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise ValueError(
            f"model.data.splits_string={splits_string!r} must be three numbers, not all 0, such as 98,1,1, to divide a "
            f"list of files; or name the files of train, validation and test in model.data.data_prefix"
        )
    bounds = np.rint(np.cumsum(shares[:2]) / sum(shares) * num_rows).astype(int)
    return np.split(np.arange(num_rows), bounds)


@dataclass(frozen=True)
class _Part:
    """A file of a blend, and the rows of it that are used."""

    weight: float
    path: str
    rows: PromptFile | IndexedDataset
    documents: np.ndarray


def _open_parts(files, data_impl: str) -> list[_Part]:
    parts = []
    for weight, path in _weights_and_paths(files):
        rows = _open_rows(path, data_impl)
        parts.append(_Part(weight, path, rows, np.arange(len(rows))))
    return parts


def _weights_and_paths(files) -> list[tuple[float, str]]:
    if isinstance(files, str) or not isinstance(files, Sequence):
        raise ValueError(f"model.data.data_prefix: {files!r} must be a list of files, such as [prompts.jsonl]")
    alternating = [1.0, files[0]] if len(files) == 1 else files
    try:
        weighted = [(float(weight), path) for weight, path in zip(alternating[::2], alternating[1::2], strict=True)]
    except (TypeError, ValueError):
        weighted = []
    if not weighted or not all(0 < weight < math.inf and isinstance(path, str) for weight, path in weighted):
        raise ValueError(
            f"model.data.data_prefix: {list(files)} must be [path], or [weight, path, weight, path, ...] with "
            f"weights above 0"
        )
    return weighted


def _open_rows(path: str, data_impl: str) -> PromptFile | IndexedDataset:
    if data_impl in ("json", "jsonl"):
        return PromptFile(path)
    if data_impl != "mmap":
        raise RuntimeError(f"model.data.data_impl={data_impl!r} must be json, jsonl or mmap")
    if not IndexedDataset.exists(path):
        raise ValueError(f"{path}.bin or {path}.idx is missing; model.data.data_prefix takes their path without ending")
    return IndexedDataset(path)


def _build_dataset(cls, cfg, parts: list[_Part], num_samples, seq_length, seed, tokenizer, name) -> Dataset | None:
    if num_samples == 0:
        raise ValueError(f"{name}: 0 samples were asked for; give -1 for all, or a positive count")
    used = [part for part in parts if len(part.documents)]
    if not used:
        return None
    for part in parts:
        if len(part.documents) == 0:
            logging.warning(f"{name}: no row of {part.path} falls into this split; the other files are blended alone")
    if len(used) == 1 and num_samples > 0:
        available = len(used[0].documents)
        if num_samples > available:
            logging.warning(f"{name}: {num_samples} samples were asked for; there are {available}, all of them used")
        used = [replace(used[0], documents=used[0].documents[:num_samples])]
    datasets = [
        cls(
            cfg=cfg,
            tokenizer=tokenizer,
            name=name,
            data_prefix=part.path,
            documents=part.documents,
            data=part.rows,
            seq_length=seq_length,
            seed=seed,
            drop_last=cfg.data.get("validation_drop_last", True) if _split_of(name) == "validation" else True,
        )
        for part in used
    ]
    if len(datasets) == 1:
        return datasets[0]
    size = num_samples if num_samples > 0 else sum(len(dataset) for dataset in datasets)
    return BlendedDataset(datasets, [part.weight for part in used], size)


def _check_split_names(data_prefix: Mapping) -> None:
    for name in SPLITS:
        assert data_prefix.get(name), f"model.data.data_prefix.{name} must be a list with at least one file"
    for name in data_prefix:
        if _split_of(name) not in SPLITS:
            raise NotImplementedError(
                f"model.data.data_prefix.{name} is not supported; the keys are train, test, validation and further "
                f"ones that begin with validation"
            )


def _split_of(name: str) -> str:
    """The split that a key of `data_prefix` belongs to: there may be several validation sets."""
    return "validation" if name.startswith("validation") else name


def _refuse_chunks(n_chunks, n_examples_per_chunk) -> None:
    if n_chunks is not None or n_examples_per_chunk is not None:
        raise NotImplementedError("n_chunks and n_examples_per_chunk serve other algorithms; leave them at None")


# ---- batches


def collate_with_batch_max_sequence_length(
    data_batch: Sequence[dict],
    response_token_length: int,
    eos_id: int,
    reset_position_ids: bool,
    reset_attention_mask: bool,
    eod_mask_loss: bool,
    generate_masks_and_position_ids: bool,
) -> dict[str, torch.Tensor]:
    """Collate B prompts, with room for their responses.

    Returns, with S = longest prompt + `response_token_length`:
        text: int64 [B, S], right-padded with `eos_id`, so that generation can write in place
        length: int64 [B], prompt lengths
        loss_multiplier: bool [B]; prompt_index: int64 [B]; is_padding: bool [B]; each if the items have it
        attention_mask: bool [1 or B, 1, S, S], True = blocked; loss_mask: float32 [B, S], 0 in rows without
            loss_multiplier; position_ids: int64 [B, S]; all three if requested
    """
    width = max(len(item["text"]) for item in data_batch) + response_token_length
    text = torch.full((len(data_batch), width), eos_id, dtype=torch.int64)
    for row, item in zip(text, data_batch, strict=True):
        row[: len(item["text"])] = item["text"]
    batch = {"text": text, "length": torch.tensor([item["length"] for item in data_batch], dtype=torch.int64)}
    for key, dtype in (("loss_multiplier", torch.bool), ("prompt_index", torch.int64), ("is_padding", torch.bool)):
        if key in data_batch[0]:
            batch[key] = torch.tensor([item[key] for item in data_batch], dtype=dtype)
    if generate_masks_and_position_ids:
        # Imported here, because it pulls in NeMo's whole NLP collection and rejection sampling never needs it.
        from nemo.collections.nlp.modules.common.megatron.utils import get_ltor_masks_and_position_ids

        attention_mask, loss_mask, position_ids = get_ltor_masks_and_position_ids(
            text, eos_id, reset_position_ids, reset_attention_mask, eod_mask_loss
        )
        if "loss_multiplier" in batch:
            loss_mask = loss_mask * batch["loss_multiplier"].unsqueeze(1)
        batch |= {"attention_mask": attention_mask, "loss_mask": loss_mask, "position_ids": position_ids}
    return batch


def collate_with_pad_to_max_batch(
    max_seqlen: int, tokenizer_eos_id: int, cfg, generate_masks_and_position_ids: bool = False
) -> Callable[[Sequence[dict]], dict[str, torch.Tensor]]:
    """A collate function that leaves room for `max_seqlen` tokens after the longest prompt; `cfg` is the full config.

    Masks and position ids cost S x S entries per batch and are unused in rejection sampling, so they are built only
    with `generate_masks_and_position_ids=True`.
    """
    return partial(
        collate_with_batch_max_sequence_length,
        response_token_length=max_seqlen,
        eos_id=tokenizer_eos_id,
        reset_position_ids=cfg.model.data.get("reset_position_ids", False),
        reset_attention_mask=cfg.model.data.get("reset_attention_mask", False),
        eod_mask_loss=cfg.model.data.get("eod_mask_loss", False),
        generate_masks_and_position_ids=generate_masks_and_position_ids,
    )


def identity_collate(batch):
    """Return the items of a batch as a list, unchanged."""
    return batch


def build_dataloader(
    cfg,
    dataset,
    consumed_samples,
    mbs,
    gbs,
    drop_last=True,
    pad_samples_to_global_batch_size=False,
    collate_fn=None,
    load_gbs=True,
    use_random_sampler=True,
) -> DataLoader:
    """A loader of this data-parallel rank's batches; model parallelism must be initialised.

    Args:
        cfg: the full configuration; seed and number of workers are taken from its model section
        consumed_samples: rows already consumed by all ranks, over all epochs
        mbs: rows of a micro-batch on one rank
        gbs: rows of a step over all ranks
        load_gbs: a batch is this rank's part of a step, gbs / DP rows; otherwise it is one micro-batch
        use_random_sampler: `RandomBatchSampler`, for training; otherwise `SequentialBatchSampler`, for validation

    Raises:
        RuntimeError: gbs is not a multiple of mbs * DP, or the random sampler does not support `drop_last=False`
        NotImplementedError: `pad_samples_to_global_batch_size` is requested
        ValueError: there are too few rows, or none are left after `consumed_samples`
    """
    if pad_samples_to_global_batch_size:
        raise NotImplementedError("pad_samples_to_global_batch_size=True is not supported; leave it at False")
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    if min(mbs, gbs) < 1 or gbs % (mbs * data_parallel_size):
        raise RuntimeError(
            f"global batch size {gbs} must be a positive multiple of micro-batch size {mbs} * data-parallel size "
            f"{data_parallel_size}"
        )
    if not use_random_sampler and len(dataset) < gbs:
        logging.warning(f"the validation set has {len(dataset)} prompts, fewer than the {gbs} of a pass; all are used")
    sampler_class = partial(RandomBatchSampler, seed=cfg.model.seed) if use_random_sampler else SequentialBatchSampler
    num_workers = cfg.model.data.num_workers
    return DataLoader(
        dataset,
        batch_sampler=sampler_class(
            total_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=mbs,
            global_batch_size=gbs,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=data_parallel_size,
            drop_last=drop_last,
            load_gbs=load_gbs,
        ),
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=not device.on_cpu(),
        # A loader draws a seed at every iteration; a separate generator leaves the RNG state of generation unchanged.
        generator=torch.Generator(),
    )
