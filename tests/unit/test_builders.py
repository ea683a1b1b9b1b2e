import json

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_aligner.data.nlp.builders import (
    build_dataloader,
    build_dataset_generic,
    build_train_valid_test_datasets,
    build_train_valid_test_rlhf_datasets,
    check_prompt_files,
    collate_with_pad_to_max_batch,
    identity_collate,
    split_rows,
)
from nemo_aligner.data.nlp.datasets import RLHFDataset
from nemo_aligner.data.nlp.samplers import RandomBatchSampler, SequentialBatchSampler
from nemo_aligner.utils.trainer_utils import compute_num_steps_per_epoch
from tests.unit.test_datasets import LetterTokenizer

EOS = LetterTokenizer.eos_id


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(logging, "warning", messages.append)
    return messages


@pytest.fixture
def prompts(tmp_path):
    """Write a prompt file of the given name with one prompt per letter."""

    def write(name: str, texts) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write


@pytest.fixture
def data_parallel(monkeypatch):
    def set_layout(rank: int, size: int) -> None:
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda: rank)
        monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: size)

    set_layout(0, 1)
    return set_layout


def config(**data):
    data = {"num_workers": 0} | data
    return OmegaConf.create({"model": {"seed": 7, "data": data, "rs": {"length_params": {"max_length": 6}}}})


def build(data_prefix, splits_string=None, num_samples=(-1, -1, -1), data_impl="jsonl", **data):
    return build_train_valid_test_rlhf_datasets(
        cfg=config(**data).model,
        data_prefix=OmegaConf.create(data_prefix),
        data_impl=data_impl,
        splits_string=splits_string,
        train_valid_test_num_samples=num_samples,
        seq_length=10,
        seed=7,
        tokenizer=LetterTokenizer(),
    )


def texts_of(dataset) -> str:
    return "".join(dataset.record(i)["text"] for i in range(len(dataset)))


# ---- datasets


def test_mapping_of_files(prompts):
    files = {"train": [prompts("a", "abcd")], "validation": [prompts("b", "ef")], "test": [prompts("c", "g")]}
    datasets = build(files)
    assert [texts_of(dataset) for dataset in datasets] == ["abcd", "ef", "g"]
    assert [dataset.name for dataset in datasets] == ["train", "validation", "test"]
    assert [dataset.drop_last for dataset in datasets] == [True, True, True]
    assert [dataset.drop_last for dataset in build(files, validation_drop_last=False)] == [True, False, True]


def test_mapping_ignores_the_splits_string_with_a_warning(prompts, warnings):
    path = prompts("a", "abcd")
    train, _, _ = build({"train": [path], "validation": [path], "test": [path]}, splits_string="1,1,1")
    assert texts_of(train) == "abcd"
    assert len(warnings) == 1
    assert "splits_string is ignored" in warnings[0]


def test_several_validation_sets(prompts):
    path, other = prompts("a", "ab"), prompts("b", "c")
    _, validation, _ = build({"train": [path], "validation": [path], "validation_b": [other], "test": [path]})
    assert {name: texts_of(dataset) for name, dataset in validation.items()} == {
        "validation": "ab",
        "validation_b": "c",
    }


@pytest.mark.parametrize("broken", [{"test": []}, {"validation": None}, {"train": None}])
def test_mapping_needs_all_three_splits(prompts, broken):
    path = prompts("a", "ab")
    name = next(iter(broken))
    with pytest.raises(AssertionError, match=f"data_prefix.{name} must be a list"):
        build({"train": [path], "validation": [path], "test": [path]} | broken)


def test_mapping_refuses_other_keys(prompts):
    path = prompts("a", "ab")
    with pytest.raises(NotImplementedError, match=r"data_prefix\.dev is not supported"):
        build({"train": [path], "validation": [path], "test": [path], "dev": [path]})


@pytest.mark.parametrize("splits", ["6,2,2", "60/20/20", "0.6,0.2,0.2", "3, 1, 1"])
def test_one_file_is_split_without_overlap(prompts, splits):
    datasets = build([prompts("a", "abcdefghij")], splits)
    assert [texts_of(dataset) for dataset in datasets] == ["abcdef", "gh", "ij"]


def test_empty_split_is_none(prompts):
    train, validation, test = build([prompts("a", "abcd")], "3,1,0")
    assert (texts_of(train), texts_of(validation), test) == ("abc", "d", None)


@pytest.mark.parametrize("total", range(0, 30))
@pytest.mark.parametrize("splits", ["98,1,1", "1,1,1", "0,1,1", "0.5/0.25/0.25"])
def test_splits_cover_every_row_once_in_order(total, splits):
    assert np.concatenate(split_rows(splits, total)).tolist() == list(range(total))


@pytest.mark.parametrize("splits", [None, "", "1,1", "1,1,1,1", "a,b,c", "0,0,0", "2,-1,1", "nan,1,1", "inf,1,1"])
def test_bad_splits_string(prompts, splits):
    with pytest.raises(ValueError, match=r"model\.data\.splits_string=.* three numbers"):
        build([prompts("a", "abcd")], splits)


def test_blend(prompts):
    train, _, _ = build(
        {
            "train": [2, prompts("a", "ab"), "1.0", prompts("b", "cde")],
            "validation": [prompts("v", "v")],
            "test": [prompts("t", "t")],
        }
    )
    # 2 + 3 places (D20), two out of three for the first file: see test_blend_rows_by_hand
    assert texts_of(train) == "acbad"


def test_blend_of_a_given_size(prompts):
    path = prompts("v", "v")
    files = {"train": [1, prompts("a", "ab"), 1, prompts("b", "c")], "validation": [path], "test": [path]}
    assert texts_of(build(files, num_samples=(8, -1, -1))[0]) == "acbcacbc"


def test_blended_files_are_split_each(prompts, warnings):
    train, validation, test = build([1, prompts("a", "abcdefghij"), 1, prompts("b", "uv")], "8,1,1")
    assert sorted(texts_of(train)) == sorted("abcde" + "uvuvu")
    assert (texts_of(validation), texts_of(test)) == ("i", "j")
    assert len(warnings) == 2
    assert "validation: no row of " in warnings[0]


@pytest.mark.parametrize("files", [[], ["a", "b"], [1, "a", 2], [0, "a", 1, "b"], [-1, "a", 1, "b"], [1, 2], [0.5]])
def test_bad_file_lists(files):
    with pytest.raises(ValueError, match=r"must be \[path\], or \[weight, path"):
        build(files, "1,1,1")


def test_a_bare_path_is_no_file_list(prompts):
    path = prompts("a", "ab")
    with pytest.raises(ValueError, match=r"must be a list of files"):
        build({"train": path, "validation": [path], "test": [path]})


def test_sample_counts(prompts, warnings):
    path = prompts("a", "abcd")
    files = {"train": [path], "validation": [path], "test": [path]}
    assert [texts_of(dataset) for dataset in build(files, num_samples=(3, -8, 9))] == ["abc", "abcd", "abcd"]
    assert len(warnings) == 1
    assert "test: 9 samples were asked for; there are 4" in warnings[0]
    with pytest.raises(ValueError, match="test: 0 samples"):
        build(files, num_samples=(-1, -1, 0))


def test_build_dataset_generic(prompts):
    kwargs = {"data_impl": "json", "num_samples": -1, "seq_length": 10, "seed": 7, "tokenizer": LetterTokenizer()}
    path = prompts("a", "abc")
    cfg = config(validation_drop_last=False).model
    dataset = build_dataset_generic(RLHFDataset, cfg, [path], name="validation", **kwargs)
    assert (texts_of(dataset), dataset.name, dataset.drop_last) == ("abc", "validation", False)
    with pytest.raises(NotImplementedError, match="n_chunks"):
        build_dataset_generic(RLHFDataset, cfg, [path], name="train", n_chunks=2, **kwargs)


def test_dataset_class_comes_first(prompts):
    seen = []

    class OtherDataset:
        def __init__(self, **kwargs):
            seen.append(kwargs)

    path = prompts("a", "abc")
    files = {"train": [path], "validation": [path], "test": [path]}
    train, _, _ = build_train_valid_test_datasets(
        OtherDataset, config().model, files, "jsonl", None, [-1, -1, -1], 10, 5, LetterTokenizer()
    )
    assert isinstance(train, OtherDataset)
    assert [kwargs["name"] for kwargs in seen] == ["train", "validation", "test"]
    assert seen[0]["documents"].tolist() == [0, 1, 2]
    assert (seen[0]["data_prefix"], seen[0]["seq_length"], seen[0]["seed"]) == (path, 10, 5)


def test_indexed_data(tmp_path):
    prefix = str(tmp_path / "tokens")
    writer = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for ids in ([1, 2], [3], [4, 5, 6]):
        writer.add_document(torch.tensor(ids), [len(ids)])
    writer.finalize(prefix + ".idx")
    train, validation, test = build([prefix], "1,1,1", data_impl="mmap")
    assert [dataset[0]["text"].tolist() for dataset in (train, validation, test)] == [[1, 2], [3], [4, 5, 6]]
    assert test.record(0) == {"text": "def"}
    assert check_prompt_files([prefix], "mmap") == {prefix: 3}


def test_missing_indexed_data(tmp_path):
    with pytest.raises(ValueError, match=r"tokens\.idx is missing.*without ending"):
        build([str(tmp_path / "tokens")], "1,1,1", data_impl="mmap")


def test_unknown_data_impl(prompts):
    with pytest.raises(RuntimeError, match=r"model\.data\.data_impl='csv'"):
        build([prompts("a", "ab")], "1,1,1", data_impl="csv")


def test_check_prompt_files(prompts, tmp_path):
    a, b = prompts("a", "abc"), prompts("b", "d")
    files = OmegaConf.create({"train": [0.5, a, 0.5, b], "validation": [b], "test": [b]})
    assert check_prompt_files(files, "jsonl") == {a: 3, b: 1}
    files.validation = [str(tmp_path / "missing")]
    with pytest.raises(ValueError, match="missing: there is no such prompt file"):
        check_prompt_files(files, "jsonl")


# ---- batches


def items(*texts):
    records = [{"text": text} for text in texts]
    dataset = RLHFDataset(config().model, LetterTokenizer(), "train", "p", range(len(texts)), records, 10, seed=7)
    return [dataset[i] for i in range(len(texts))]


def test_collate(warnings):
    batch = collate_with_pad_to_max_batch(2, EOS, config())(items("abc", "", "d"))
    assert batch["text"].tolist() == [[1, 2, 3, EOS, EOS], [4, EOS, EOS, EOS, EOS], [4, EOS, EOS, EOS, EOS]]
    assert batch["length"].tolist() == [3, 1, 1]
    assert batch["loss_multiplier"].tolist() == [True, False, True]
    assert batch["prompt_index"].tolist() == [0, 1, 2]
    assert batch["is_padding"].tolist() == [False, False, False]
    assert {key: str(value.dtype) for key, value in batch.items()} == {
        "text": "torch.int64",
        "length": "torch.int64",
        "loss_multiplier": "torch.bool",
        "prompt_index": "torch.int64",
        "is_padding": "torch.bool",
    }


def test_collate_of_foreign_items():
    batch = collate_with_pad_to_max_batch(1, 9, config())([{"text": torch.tensor([5, 6]), "length": 2}])
    assert {key: value.tolist() for key, value in batch.items()} == {"text": [[5, 6, 9]], "length": [2]}


def test_collate_with_masks(warnings):
    collate = collate_with_pad_to_max_batch(1, EOS, config(), generate_masks_and_position_ids=True)
    batch = collate(items("ab", ""))
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"].tolist() == [[[[False, True, True], [False, False, True], [False, False, False]]]]
    assert batch["loss_mask"].tolist() == [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_collate_with_masks_honours_the_switches_of_the_data_section():
    cfg = config(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    batch = collate_with_pad_to_max_batch(0, 2, cfg, True)([{"text": torch.tensor([5, 2, 6]), "length": 3}])
    assert batch["attention_mask"].tolist() == [[[[False, True, True], [False, False, True], [True, True, False]]]]
    assert batch["loss_mask"].tolist() == [[1.0, 0.0, 1.0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_dataloader(prompts, data_parallel, num_workers):
    cfg = config(num_workers=num_workers)
    path = prompts("a", "abcdefghij")
    dataset = build_dataset_generic(RLHFDataset, cfg.model, [path], "jsonl", -1, 10, 7, LetterTokenizer(), name="train")
    collate = collate_with_pad_to_max_batch(6, EOS, cfg)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(cfg.model.seed + 1)).tolist()
    rows = []
    for rank in (0, 1):
        data_parallel(rank, 2)
        # an epoch uses 8 of the 10 rows: with 12 consumed, the second step of the second epoch is next
        loader = build_dataloader(cfg, dataset, 12, mbs=2, gbs=4, collate_fn=collate, load_gbs=False)
        (batch,) = loader
        rows.append(batch["prompt_index"].tolist())
        assert batch["text"].shape == (2, 1 + 6)
        assert loader.persistent_workers == (num_workers > 0)
    assert rows == [order[4:6], order[6:8]]
    sampler = loader.batch_sampler
    assert isinstance(sampler, RandomBatchSampler)
    assert (sampler.global_batch_size, sampler.micro_batch_size, sampler.total_samples) == (4, 2, 10)
    assert (sampler.drop_last, sampler.consumed_samples) == (True, 16)
    assert compute_num_steps_per_epoch(sampler) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_validation_dataloader_flags_what_only_fills_a_batch(prompts, data_parallel, warnings, num_workers):
    cfg = config(num_workers=num_workers)
    dataset = build_dataset_generic(
        RLHFDataset, cfg.model, [prompts("a", "abcde")], "jsonl", -1, 10, 7, LetterTokenizer(), name="validation"
    )
    collate = collate_with_pad_to_max_batch(6, EOS, cfg)
    counted, lengths = [], []
    for rank in (0, 1):
        data_parallel(rank, 2)
        loader = build_dataloader(
            cfg, dataset, 0, mbs=2, gbs=8, collate_fn=collate, load_gbs=False, use_random_sampler=False
        )
        assert isinstance(loader.batch_sampler, SequentialBatchSampler)
        lengths.append(len(loader))
        for batch in loader:
            counted += batch["prompt_index"][~batch["is_padding"]].tolist()
    assert lengths == [2, 2]
    assert sorted(counted) == [0, 1, 2, 3, 4]
    assert len(warnings) == 2  # one a rank
    assert "5 prompts, fewer than the 8 of a pass" in warnings[0]


def test_load_gbs_yields_this_ranks_part_of_a_step(data_parallel):
    data_parallel(1, 2)
    loader = build_dataloader(
        config(), list(range(8)), 0, mbs=2, gbs=8, collate_fn=identity_collate, use_random_sampler=False
    )
    assert list(loader) == [[2, 3, 6, 7]]


@pytest.mark.parametrize(("mbs", "gbs"), [(2, 6), (3, 4), (2, 0), (0, 4)])
def test_sizes_must_divide(data_parallel, mbs, gbs):
    data_parallel(0, 2)
    with pytest.raises(RuntimeError, match=f"global batch size {gbs} must be a positive multiple of .* {mbs} "):
        build_dataloader(config(), list(range(8)), 0, mbs=mbs, gbs=gbs)


def test_step_padding_is_refused(data_parallel):
    with pytest.raises(NotImplementedError, match="pad_samples_to_global_batch_size"):
        build_dataloader(config(), list(range(8)), 0, mbs=1, gbs=4, pad_samples_to_global_batch_size=True)


def test_loader_leaves_the_global_random_state_alone(data_parallel):
    loader = build_dataloader(config(), list(range(8)), 0, mbs=1, gbs=4, collate_fn=identity_collate)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)
