"""Hugging Face models to `.nemo` archives: packing, whole models, the tokenizer that is included, refused sources."""

import contextlib
import json
import runpy
import shutil
import sys

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from nemo_aligner.convert.hf_source import check_config, open_source, require_fast_tokenizer
from nemo_aligner.convert.hf_to_nemo import convert
from nemo_aligner.convert.name_map import hf_names, pack
from tests.tiny import load_actor, save_tiny_llama

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


# Packing


def test_qkv_is_packed_group_by_group():
    # 4 query heads in 2 groups, 2 channels per head, hidden size 1: query 1xx, key 2xx, value 3xx; head, then channel
    query = torch.tensor([[100], [101], [110], [111], [120], [121], [130], [131]])
    key, value = torch.tensor([[200], [201], [210], [211]]), torch.tensor([[300], [301], [310], [311]])
    assert pack([query, key, value], num_groups=2).flatten().tolist() == [
        *(100, 101, 110, 111, 200, 201, 300, 301),
        *(120, 121, 130, 131, 210, 211, 310, 311),
    ]


def test_gate_stands_above_up_and_single_tensors_stay():
    gate, up = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 8]])
    assert pack([gate, up], num_groups=1).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert pack([gate], num_groups=1) is gate


def test_names():
    q, k, v = (f"model.layers.11.self_attn.{x}_proj.weight" for x in "qkv")
    assert hf_names("decoder.layers.11.self_attention.linear_qkv.weight") == (q, k, v)
    norm = ("model.layers.3.input_layernorm.weight",)
    assert hf_names("decoder.layers.3.input_layernorm.weight") == norm
    assert hf_names("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight") == norm  # Transformer Engine's
    assert hf_names("output_layer.weight") == ("lm_head.weight",)
    with pytest.raises(KeyError):
        hf_names("decoder.layers.3.self_attention.linear_qkv.bias")


# Whole models


def shard(folder):
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100kB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def as_torch_file(folder):
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=False)
    (folder / "model.safetensors").unlink()
    assert (folder / "pytorch_model.bin").is_file()


def add_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({"tie_word_embeddings": False}, None),
        ({"tie_word_embeddings": True}, shard),
        ({"tie_word_embeddings": True}, as_torch_file),
        ({"num_key_value_heads": 4, "rope_theta": 500.0, "rms_norm_eps": 1e-3, "head_dim": 8}, None),
        ({"num_key_value_heads": 1, "vocab_size": 331}, None),
    ],
    ids=["untied", "sharded", "bin", "other_sizes", "odd_vocabulary"],
)
def test_a_converted_model_gives_the_same_logits(tmp_path, config, layout):
    folder = save_tiny_llama(tmp_path / "hf", num_hidden_layers=2, **config)
    if layout is not None:
        layout(folder)
    convert(folder, tmp_path / "converted.nemo")
    hf_model = LlamaForCausalLM.from_pretrained(folder).eval()
    actor = load_actor(tmp_path / "converted.nemo")
    actor.prepare_for_inference()
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = actor.model(tokens, torch.arange(20).expand_as(tokens), None, labels=None)
        theirs = hf_model(tokens).logits
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() <= 1e-5
    # bit for bit, in addition to the logits
    tensors = hf_model.state_dict()
    for name, parameter in actor.model.named_parameters():
        expected = pack([tensors[hf_name] for hf_name in hf_names(name)], hf_model.config.num_key_value_heads)
        assert torch.equal(parameter, expected), name


def test_bf16_archives_hold_rounded_weights(tiny_hf, tmp_path):
    convert(tiny_hf, tmp_path / "bf16.nemo", precision="bf16")
    actor = load_actor(tmp_path / "bf16.nemo", megatron_amp_O2=False, precision=32)
    embedding = LlamaForCausalLM.from_pretrained(tiny_hf).model.embed_tokens.weight
    assert torch.equal(actor.model.embedding.word_embeddings.weight, embedding.bfloat16().float())


def test_the_archive_carries_its_tokenizer(tmp_path):
    folder = save_tiny_llama(tmp_path / "hf", num_hidden_layers=1)
    add_chat_template(folder)
    original = AutoTokenizer.from_pretrained(folder)
    convert(folder, tmp_path / "converted.nemo")
    shutil.rmtree(folder)
    tokenizer = load_actor(tmp_path / "converted.nemo").tokenizer
    text = "the lazy dog \u20ac <|endoftext|>"
    assert tokenizer.text_to_ids(text) == original(text).input_ids
    assert tokenizer.eos_id == original.eos_token_id == 0 and tokenizer.vocab_size == len(original)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.tokenizer.apply_chat_template(messages, tokenize=False) == "[user] hello\n"


# What is refused, and with which reason

CONFIGS = [
    ({"architectures": ["MistralForCausalLM"]}, r"architectures is 'MistralForCausalLM': only LlamaForCausalLM"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_scaling is .*'linear'.*: RoPE scaling is not"),
    ({"attention_bias": True}, r"attention_bias is True: attention biases are not supported"),
    ({"mlp_bias": True}, r"mlp_bias is True: MLP biases are not supported"),
    ({"hidden_act": "gelu"}, r"hidden_act is 'gelu': only silu"),
    (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        r"quantization_config .* dequantize the model first",
    ),
]


@pytest.fixture
def copied(tiny_hf, tmp_path):
    return shutil.copytree(tiny_hf, tmp_path / "hf")


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_models_of_another_make_are_refused(copied, tmp_path, changes, message):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=f"{copied}: {message}"):
        convert(copied, tmp_path / "never.nemo")
    assert not (tmp_path / "never.nemo").exists()


def test_unscaled_rope_is_accepted(copied):
    config = AutoConfig.from_pretrained(copied)
    config.rope_scaling = {"rope_type": "default"}
    check_config(config, copied)


def test_a_missing_tensor_is_named(copied, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        convert(copied, tmp_path / "never.nemo")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "model.layers.2.self_attn.q_norm.weight",
            1.0,
            r"has no tensor 'model\.layers\.2\.self_attn\.q_norm\.weight' \(1",
        ),
        ("model.norm.weight", float("nan"), r"the tensor 'model\.norm\.weight' has values that are NaN"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", 1.0, None),
        ("lm_head.weight", 1.0, None),  # redundant: the model has tied embeddings
    ],
)
def test_tensors_that_would_be_lost_and_values_that_are_none(copied, tmp_path, name, value, message):
    from safetensors.torch import load_file, save_file

    save_file({**load_file(copied / "model.safetensors"), name: torch.full((64,), value)}, copied / "model.safetensors")
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        convert(copied, tmp_path / "model.nemo")
    assert (tmp_path / "model.nemo").exists() == (message is None)


def test_a_tensor_of_another_shape_is_named(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ValueError, match=r"mlp\.linear_fc1\.weight has shape \(256, 64\), not \(192, 64\)"):
        convert(copied, tmp_path / "never.nemo")


def test_missing_files_are_named(copied, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        open_source(tmp_path / "nowhere")
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights in it"):
        open_source(copied)
    (copied / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json in it"):
        open_source(copied)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match=r"model\.gguf: not a GGUF file"):
        open_source(tmp_path / "model.gguf")


def cut(name):
    def halve(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return halve


def without_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def cut_shard(folder):
    shard(folder)
    cut("model-00002-of-00008.safetensors")(folder)


def without_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00008.safetensors").unlink()


def cut_torch_file(folder):
    as_torch_file(folder)
    cut("pytorch_model.bin")(folder)


def with_text(name, text):
    return lambda folder: (folder / name).write_text(text)


DAMAGES = [
    (without_tokenizer, ": no tokenizer in it that transformers can load; copy tokenizer.json and"),
    (cut("tokenizer.json"), "/tokenizer.json: not valid JSON (Expecting"),
    (cut("config.json"), "/config.json: not valid JSON (Unterminated string"),
    (with_text("config.json", "[]"), "/config.json: a list, not an object; copy the file again"),
    (with_text("config.json", "{}"), "/config.json: Unrecognized model in "),
    (cut("generation_config.json"), "/generation_config.json: not valid JSON (Expecting"),
    (cut("model.safetensors"), "/model.safetensors: not a whole safetensors file (Error while deserializing header: "),
    (cut_shard, "/model-00002-of-00008.safetensors: not a whole safetensors file (Error while deserializing header: "),
    (without_shard, "/model-00002-of-00008.safetensors: not a whole safetensors file (No such file or directory"),
    (with_text("model.safetensors.index.json", "{}"), "/model.safetensors.index.json: no weight_map in it; copy"),
    (cut_torch_file, "/pytorch_model.bin: not a whole file of tensors; copy it again"),
]


def run_script(monkeypatch, capfd, source, output):
    """The exit code and the last line on stderr."""
    monkeypatch.setattr(sys, "argv", ["convert", "--input", str(source), "--output", str(output)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path("examples/nlp/gpt/convert_hf_to_nemo.py", run_name="__main__")
    return end.value.code, capfd.readouterr().err.rstrip("\n").splitlines()[-1]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(copied, tmp_path, monkeypatch, capfd, damage, message):
    damage(copied)
    code, line = run_script(monkeypatch, capfd, copied, tmp_path / "never.nemo")
    assert code == 2 and line.startswith(f"error: {copied}{message}")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_as_output_is_refused_at_once(tmp_path, monkeypatch, capfd):
    expected = f"error: {tmp_path}: the output is a folder; give a file name ending in .nemo"
    assert run_script(monkeypatch, capfd, "nowhere", tmp_path) == (2, expected)


def test_a_gguf_file_of_another_architecture_and_one_that_was_cut(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"architecture 'gpt2' is not supported; only 'llama'"):
        open_source(tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    for length in (20, len(content) - 8):
        (tmp_path / "model.gguf").write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"^{tmp_path}/model\.gguf: not a whole GGUF file \(.*\); copy it again$"):
            open_source(tmp_path / "model.gguf")


def test_tokenizers_that_cannot_travel_are_refused(tiny_hf):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json form"):
        require_fast_tokenizer(object())
    tokenizer = AutoTokenizer.from_pretrained(tiny_hf)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        require_fast_tokenizer(tokenizer)
