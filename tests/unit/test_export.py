"""`.nemo` archives to Hugging Face folders: bit-identical round trips, trained models, what is refused."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from nemo_aligner.convert.hf_to_nemo import convert
from nemo_aligner.convert.name_map import pack, unpack
from nemo_aligner.convert.nemo_to_hf import check_is_llama, export
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.utils import load_checkpoint_model_config
from tests.distributed.launch import run_ranks
from tests.tiny import END, load_actor, save_tiny_llama

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


def assert_same_tensors(folder, expected):
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def settings(folder):
    """config.json without the path that transformers records when it loads a model."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    return config


def extract(archive, folder):
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


# Unpacking


def test_qkv_is_unpacked_group_by_group():
    # 4 query heads in 2 groups, 2 channels per head, hidden size 1: query 1xx, key 2xx, value 3xx; head, then channel
    packed = torch.tensor(
        [100, 101, 110, 111, 200, 201, 300, 301, 120, 121, 130, 131, 210, 211, 310, 311]
    ).unsqueeze(-1)  # fmt: skip
    query, key, value = unpack(packed, num_tensors=3, num_heads=4, num_groups=2)
    assert query.flatten().tolist() == [100, 101, 110, 111, 120, 121, 130, 131]
    assert key.flatten().tolist() == [200, 201, 210, 211] and value.flatten().tolist() == [300, 301, 310, 311]
    assert torch.equal(pack([query, key, value], num_groups=2), packed)


def test_gate_is_the_upper_half():
    gate, up = unpack(torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]), num_tensors=2, num_heads=1, num_groups=1)
    assert gate.tolist() == [[1, 2], [3, 4]] and up.tolist() == [[5, 6], [7, 8]]


# There and back


@pytest.mark.parametrize(
    ("config", "precision", "dist_ckpt_format"),
    [
        ({"tie_word_embeddings": True}, "32", "torch_dist"),
        ({"tie_word_embeddings": False, "vocab_size": 331}, "32", "zarr"),
        (
            {
                "tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 8, "rope_theta": 5e5,
                "rms_norm_eps": 1e-3, "max_position_embeddings": 96,
            },
            "bf16",
            "torch_dist",
        ),
        ({"tie_word_embeddings": True, "num_key_value_heads": 1}, "bf16", "zarr"),
    ],
    ids=["tied", "untied_odd_vocabulary_zarr", "bf16_untied_other_sizes", "bf16_tied_zarr"],
)  # fmt: skip
def test_the_round_trip_is_bit_equal(tmp_path, config, precision, dist_ckpt_format):
    folder = save_tiny_llama(tmp_path / "hf", num_hidden_layers=2, **config)
    if precision == "bf16":
        LlamaForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    convert(folder, tmp_path / "model.nemo", precision, dist_ckpt_format)
    export(tmp_path / "model.nemo", tmp_path / "back", precision)
    assert_same_tensors(tmp_path / "back", load_file(folder / "model.safetensors"))
    assert settings(tmp_path / "back") == settings(folder)


def test_what_training_does_not_have_comes_back(tmp_path):
    folder = save_tiny_llama(tmp_path / "hf", num_hidden_layers=1, pad_token_id=7, eos_token_id=[0, 5])
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [0, 5], "max_length": 77}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    convert(folder, tmp_path / "base.nemo")
    overrides = {"encoder_seq_length": 32, "max_position_embeddings": 32}
    load_actor(tmp_path / "base.nemo", **overrides).save_to(str(tmp_path / "trained.nemo"))
    assert load_checkpoint_model_config(str(tmp_path / "trained.nemo")).max_position_embeddings == 32
    export(tmp_path / "trained.nemo", tmp_path / "back")
    assert settings(tmp_path / "back") == settings(folder)
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == generation
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.generation_config.eos_token_id == [0, 5] and model.generation_config.temperature == 0.6


def test_an_older_archive_has_the_values_of_its_training(trained, tmp_path):
    folder = extract(trained[0], tmp_path / "archive")
    config = OmegaConf.load(folder / "model_config.yaml")
    config.max_position_embeddings = 48
    del config.hf_config, config.hf_generation_config
    OmegaConf.save(config, folder / "model_config.yaml")
    export(folder, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (model.config.max_position_embeddings, model.config.eos_token_id) == (48, 0)
    assert model.generation_config.eos_token_id == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model's archive, the model itself, and the tokenizer it was converted with."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("trained") / "hf", num_hidden_layers=2, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    convert(folder, folder.parent / "base.nemo")
    actor = load_actor(folder.parent / "base.nemo")
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    actor.save_to(str(folder.parent / "trained.nemo"))
    return folder.parent / "trained.nemo", actor, tokenizer


def test_a_trained_model_comes_out_whole(trained, tmp_path):
    archive, actor, tokenizer = trained
    export(archive, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    actor.prepare_for_inference()
    with torch.no_grad():
        ours = actor.model(tokens, torch.arange(20).expand_as(tokens), None, labels=None)
        theirs = model(tokens).logits
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() <= 1e-5
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (0, 0)  # both default to 2

    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = f"the lazy dog \u20ac {END}"
    assert exported(text).input_ids == tokenizer(text).input_ids
    assert exported.special_tokens_map == tokenizer.special_tokens_map and len(exported) == len(tokenizer)
    assert exported.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi\n"


def test_bf16_folders_hold_rounded_weights(trained, tmp_path):
    archive, actor, _ = trained
    export(archive, tmp_path / "hf", precision="bf16")
    found = load_file(tmp_path / "hf/model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(found["lm_head.weight"], actor.model.output_layer.weight.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype="auto").dtype == torch.bfloat16


def save_from_four_ranks(rank, folders):
    for folder in folders:
        actor = load_actor(folder / "base.nemo", 4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
        actor.save_to(str(folder / "trained.nemo"))


def test_the_layout_of_the_training_does_not_matter(tmp_path):
    folders = {tied: tmp_path / f"tied_{tied}" for tied in (True, False)}
    for tied, folder in folders.items():
        convert(save_tiny_llama(folder / "hf", num_hidden_layers=2, tie_word_embeddings=tied), folder / "base.nemo")
    run_ranks(save_from_four_ranks, 4, list(folders.values()))
    for folder in folders.values():
        export(folder / "trained.nemo", folder / "back")
        assert_same_tensors(folder / "back", load_file(folder / "hf/model.safetensors"))


def test_a_padded_vocabulary_is_cut_to_the_tokenizers(trained, tmp_path):
    archive, actor, tokenizer = trained
    folder = extract(archive, tmp_path / "extracted")
    cfg = OmegaConf.load(folder / "model_config.yaml")
    del cfg.override_vocab_size
    cfg.make_vocab_size_divisible_by, cfg.tensor_model_parallel_size = 64, 2  # 320 entries, padded to 384
    OmegaConf.save(cfg, folder / "model_config.yaml")
    export(folder, tmp_path / "hf")
    found = load_file(tmp_path / "hf/model.safetensors")
    assert len(tokenizer) == 320
    assert torch.equal(found["model.embed_tokens.weight"], actor.model.embedding.word_embeddings.weight[:320])
    assert torch.equal(found["lm_head.weight"], actor.model.output_layer.weight[:320])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.vocab_size == 320


# What is refused, and with which reason

MISSING = object()
CHANGES = [
    ("normalization", "layernorm", r"model\.normalization is 'layernorm': a Llama needs 'rmsnorm'"),
    ("bias", MISSING, r"model\.bias is True: a Llama needs False"),
    ("activation", "gelu", r"model\.activation is 'gelu': a Llama needs 'swiglu'"),
    ("position_embedding_type", "learned_absolute", r"model\.position_embedding_type is 'learned_absolute': .*'rope'"),
    ("rotary_percentage", 0.5, r"model\.rotary_percentage is 0\.5: a Llama needs 1\.0"),
    ("qkv_bias", True, r"model\.qkv_bias is True: a Llama needs False"),
    ("mcore_customization_config", {"new_decoder_architecture": True}, r"model\.mcore_customization_config is {'new_"),
    ("reward_model_type", "regression", r"model\.reward_model_type is 'regression': only language models"),
    ("peft", {"peft_scheme": "lora"}, r"model\.peft\.peft_scheme is 'lora': .* give it as --lora"),
    ("tokenizer", {"library": "megatron"}, r"model\.tokenizer\.files does not name files of the archive: only"),
]


@pytest.mark.parametrize(("key", "value", "message"), CHANGES, ids=[key for key, _, _ in CHANGES])
def test_models_that_no_llama_can_be_are_refused(tiny_nemo, key, value, message):
    cfg = load_checkpoint_model_config(str(tiny_nemo))
    with open_dict(cfg):
        cfg.pop(key, None)
        if value is not MISSING:
            cfg[key] = value
    with pytest.raises(ConfigError, match=rf"^archive: {message}") as error:
        check_is_llama(cfg, Path("archive"))
    assert "\n" not in str(error.value)


def test_an_existing_folder_is_left_alone(tiny_nemo, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=rf"^--output: {tmp_path} exists already"):
        export(tiny_nemo, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_export_leaves_nothing_behind(tiny_nemo, tmp_path, monkeypatch):
    def interrupted(self, folder):
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(tiny_nemo, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_the_script_refuses_in_one_line():
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    answer = subprocess.run(
        [sys.executable, "examples/nlp/gpt/convert_nemo_to_hf.py", "--input", "nowhere.nemo", "--output", "never"],
        cwd=Path(__file__).parents[2],
        env={key: value for key, value in os.environ.items() if key not in names},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-1].startswith("error: --input: nowhere.nemo does not exist")
