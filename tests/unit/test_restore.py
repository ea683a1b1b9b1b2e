"""Weights, config and tokenizer are restored from `.nemo` archives, both our own and those that NeMo wrote."""

import gzip
import shutil
import tarfile
import tempfile

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
from omegaconf import OmegaConf, open_dict
from pytorch_lightning import Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from nemo_aligner.compat import device
from nemo_aligner.convert.hf_to_nemo import convert
from nemo_aligner.models.nlp.gpt.hf_tokenizer import tokenizer_config
from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
from nemo_aligner.testing.utils import Utils
from nemo_aligner.utils import nemo_weights
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.utils import load_and_override_model_config, load_checkpoint_model_config, load_from_nemo
from tests.tiny import load_actor, rs_config


@pytest.fixture(scope="module", autouse=True)
def no_groups_left_behind():
    yield
    Utils.destroy_model_parallel()


def make_trainer() -> Trainer:
    return Trainer(
        devices=1, num_nodes=1, accelerator="cpu" if device.on_cpu() else "gpu", strategy=NLPDDPStrategy(),
        logger=False, enable_checkpointing=False,
    )  # fmt: skip


def restore(path, model_cfg=None, **kwargs):
    return load_from_nemo(MegatronGPTRSModel, model_cfg, make_trainer(), restore_path=str(path), **kwargs)


def parameters_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(model, expected: dict[str, torch.Tensor]) -> None:
    found = parameters_of(model)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def trained_actor(path):
    """The actor with weights that no archive holds yet."""
    actor = load_actor(path)
    with torch.no_grad():
        for value in actor.parameters():
            value.add_(torch.randn_like(value))
    return actor


@pytest.fixture(scope="module")
def saved(tiny_nemo, tmp_path_factory):
    """Path of an archive that the actor wrote, and the parameters it had."""
    actor = trained_actor(tiny_nemo)
    path = tmp_path_factory.mktemp("saved") / "actor.nemo"
    actor.save_to(str(path))
    return path, parameters_of(actor)


# ---- round trips


@pytest.mark.parametrize("strict", [True, False])
def test_an_archive_restores_bit_for_bit(saved, strict):
    path, parameters = saved
    assert_same(restore(path, strict=strict), parameters)


@pytest.mark.parametrize("strict", [True, False])
def test_so_does_the_folder_it_was_extracted_to(saved, tmp_path, strict):
    path, parameters = saved
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    assert_same(restore(tmp_path, strict=strict), parameters)
    assert (tmp_path / "model_weights").is_dir()  # the folder is the user's, and is kept


def test_so_does_the_zarr_format(tiny_hf, tmp_path):
    convert(tiny_hf, tmp_path / "tiny.nemo", dist_ckpt_format="zarr")
    actor = trained_actor(tmp_path / "tiny.nemo")
    actor.save_to(str(tmp_path / "actor.nemo"))
    with tarfile.open(tmp_path / "actor.nemo") as archive:
        assert any(name.endswith(".zarray") for name in archive.getnames())
    assert_same(restore(tmp_path / "actor.nemo"), parameters_of(actor))


def test_an_archive_is_read_in_its_own_format_and_written_in_the_configured_one(saved, tmp_path):
    path, parameters = saved
    cfg = load_and_override_model_config(str(path), OmegaConf.create({"dist_ckpt_format": "zarr", "rs": rs_config()}))
    actor = restore(path, cfg)
    assert_same(actor, parameters)
    actor.save_to(str(tmp_path / "actor.nemo"))
    with tarfile.open(tmp_path / "actor.nemo") as archive:
        assert any(name.endswith(".zarray") for name in archive.getnames())
    assert_same(restore(tmp_path / "actor.nemo"), parameters)


@pytest.fixture
def saved_by_torch(saved, tmp_path):
    """The folder of an archive whose weights are a single file, as NeMo writes non-distributed weights."""
    with tarfile.open(saved[0]) as archive:
        archive.extractall(tmp_path / "by_torch", filter="data")
    shutil.rmtree(tmp_path / "by_torch/model_weights")
    torch.save(restore(saved[0]).state_dict(), tmp_path / "by_torch/model_weights.ckpt")
    return tmp_path / "by_torch"


def test_weights_in_one_file_restore_too(saved, saved_by_torch):
    assert_same(restore(saved_by_torch), saved[1])


def test_a_gzipped_archive_restores_and_is_saved_again(saved, tmp_path, temporary):
    path, parameters = saved
    (tmp_path / "gzipped.nemo").write_bytes(gzip.compress(path.read_bytes(), 1))
    actor = restore(tmp_path / "gzipped.nemo")
    assert_same(actor, parameters)
    actor.save_to(str(tmp_path / "again.nemo"))  # takes the tokenizer from the first archive
    assert_same(restore(tmp_path / "again.nemo"), parameters)


def test_a_model_from_a_folder_is_saved_with_its_tokenizer(saved, tmp_path, temporary):
    with tarfile.open(saved[0]) as archive:
        archive.extractall(tmp_path / "folder", filter="data")
    restore(tmp_path / "folder").save_to(str(tmp_path / "again.nemo"))
    assert_same(restore(tmp_path / "again.nemo"), saved[1])


def test_the_tokenizer_travels_in_the_archive(saved, tiny_nemo):
    path, _ = saved
    files = load_checkpoint_model_config(str(path)).tokenizer.files
    assert all(name.startswith("nemo:") for name in files.values())
    tokenizer = restore(path).tokenizer
    text = "the quick brown fox"
    assert tokenizer.ids_to_text(tokenizer.text_to_ids(text)) == text
    assert tokenizer.eos_id == load_actor(tiny_nemo).tokenizer.eos_id


# ---- configs


def test_without_a_config_the_stored_one_is_used(saved):
    path, _ = saved
    model, cfg = restore(path, return_updated_cfg=True)
    assert isinstance(model, MegatronGPTRSModel)
    assert cfg.rs.length_params.max_length == model._length_params["max_length"] == 16


def test_a_function_of_two_arguments_makes_the_config(saved):
    path, parameters = saved
    given = OmegaConf.create({"seed": 7})

    def modify(stored, model_cfg):
        with open_dict(stored):
            stored.seed = model_cfg.seed
        return stored

    model, cfg = restore(path, given, modify_config_fn=modify, return_updated_cfg=True)
    assert cfg.seed == model.cfg.seed == 7 and cfg.num_layers == 4
    assert_same(model, parameters)


def test_a_function_that_takes_the_tree_flag_is_told_false(saved):
    path, parameters = saved
    flags = []

    def modify(stored, model_cfg, add_cfg_to_tree):
        assert model_cfg is None
        flags.append(add_cfg_to_tree)
        return stored

    assert_same(restore(path, modify_config_fn=modify), parameters)
    assert flags == [False]


def test_the_stored_class_gives_way_to_the_wanted_one(tiny_nemo):
    cfg = load_checkpoint_model_config(str(tiny_nemo))
    assert "ConvertedGPTModel" in cfg.target
    with open_dict(cfg):
        cfg.rs = rs_config()
    assert type(restore(tiny_nemo, cfg)) is MegatronGPTRSModel


def test_a_run_s_settings_override_the_stored_config(saved):
    path, _ = saved
    given = OmegaConf.create(
        {"seed": 7, "optim": {"lr": 1.0}, "overwrite_base_config": {"optim": {"name": True}, "rs": True, "data": False}}
    )
    merged = load_and_override_model_config(str(path), given)
    assert (merged.seed, merged.num_layers, merged.data.seq_length) == (7, 4, 128)
    assert merged.optim == {"lr": 1.0} and "rs" not in merged
    assert not {"target", "nemo_version", "overwrite_base_config"} & set(merged)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "model=None must be a section"),
        ({"overwrite_base_config": None}, "model.overwrite_base_config=None must be a section of true and false"),
    ],
)
def test_a_run_s_settings_are_sections(saved, given, message):
    with pytest.raises(ConfigError, match=message):
        load_and_override_model_config(str(saved[0]), None if given is None else OmegaConf.create(given))


# ---- what cannot be restored


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(AssertionError, match=r"restore_path: .*nowhere\.nemo does not exist"):
        restore(tmp_path / "nowhere.nemo")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
@pytest.mark.parametrize(
    "load",
    [restore, lambda path: restore(path, OmegaConf.create()), lambda path: load_checkpoint_model_config(str(path))],
    ids=["stored config", "given config", "config alone"],
)
def test_a_truncated_archive_is_named(saved, tmp_path, share, load):
    whole = saved[0].read_bytes()
    (tmp_path / "cut.nemo").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ConfigError, match=r"cut\.nemo is not a complete \.nemo archive"):
        load(tmp_path / "cut.nemo")


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} has no model_config.yaml"):
        restore(tmp_path)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder where archives are extracted; nothing may remain there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "changes, parts",
    [
        # refused before the model is built
        ({"num_layers": 3}, ["self_attention.linear_proj.weight has the shape (4, 64, 64)", "num_layers=3"]),
        ({"hidden_size": 128}, ["word_embeddings.weight has the shape (384, 64)", "hidden_size=128"]),
        # refused before the weights are loaded
        ({"ffn_hidden_size": 256}, ["linear_fc1.weight has the shape (4, 256, 64) in the weights, but (4, 512, 64)"]),
        ({"bias": True}, ["the parameter model.decoder.layers.", "bias is missing from the weights (and"]),
        ({"share_embeddings_and_output_weights": False}, ["model.output_layer.weight is missing from the weights"]),
        ({"override_vocab_size": 512}, ["the tokenizer's 320 entries need 512 rows", "embedding table has 384"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", ["archive", "torch.save"])
def test_a_config_of_another_model(saved, saved_by_torch, temporary, kind, changes, parts):
    path = saved[0] if kind == "archive" else saved_by_torch
    cfg = load_checkpoint_model_config(str(path))
    with open_dict(cfg):
        cfg.update(changes)
    with pytest.raises(ConfigError) as caught:
        restore(path, cfg)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    if kind == "archive":
        assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "entries, message",
    [
        (500, "the tokenizer has 500 entries, but the embedding table in the weights only 384 rows"),
        (200, "the tokenizer's 200 entries need 256 rows, but the weights' embedding table has 384"),
    ],
)
def test_a_tokenizer_of_another_model(saved, tmp_path, temporary, entries, message):
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(entries)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(tmp_path / "words")
    cfg = load_checkpoint_model_config(str(saved[0]))
    with open_dict(cfg):
        cfg.tokenizer = tokenizer_config(tmp_path / "words")
        cfg.pop("override_vocab_size")
    with pytest.raises(ConfigError, match=message):
        restore(saved[0], cfg)


def test_parameters_that_the_model_does_not_have(saved, saved_by_torch, temporary, monkeypatch):
    unknown = r"hold the parameter model\.{}, which the model does not have"
    state = torch.load(saved_by_torch / "model_weights.ckpt", weights_only=True)
    torch.save({**state, "model.rm_head.weight": torch.ones(1, 64)}, saved_by_torch / "model_weights.ckpt")
    with pytest.raises(ConfigError, match=unknown.format(r"rm_head\.weight")):
        restore(saved_by_torch)
    wanted_by = nemo_weights._wanted_by

    def without_the_last_norm(model):
        tensors, *others = wanted_by(model)
        del tensors["model.decoder.final_layernorm.weight"]
        return tensors, *others

    monkeypatch.setattr(nemo_weights, "_wanted_by", without_the_last_norm)
    with pytest.raises(ConfigError, match=unknown.format(r"decoder\.final_layernorm\.weight")):
        restore(saved[0])
    assert_same(restore(saved[0], strict=False), saved[1])


def test_a_damaged_tensor(saved, tmp_path, temporary):
    with tarfile.open(saved[0]) as archive:
        archive.extractall(tmp_path / "folder", filter="data")
    (part,) = (tmp_path / "folder/model_weights").glob("__0_0.distcp")
    data = bytearray(part.read_bytes())
    start = data.rfind(b"PK\x03\x04", 0, data.index(b"/data/0"))  # the zip header before a tensor's data
    data[start : start + 4] = b"xxxx"
    part.write_bytes(data)
    with pytest.raises(ConfigError, match="the weights cannot be loaded"):
        restore(tmp_path / "folder")


class Evil:
    def __reduce__(self):
        return open, ("ran", "w")


def test_no_model_is_built_from_an_archive_with_a_program(saved, tmp_path, temporary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(saved[0]) as archive:
        archive.extractall("folder", filter="data")
    torch.save(Evil(), "folder/model_weights/common.pt")
    with tarfile.open("bad.nemo", "w") as archive:
        archive.add("folder", arcname=".")
    monkeypatch.setattr(MegatronGPTRSModel, "__init__", lambda *args, **kwargs: pytest.fail("a model was built"))
    for path in ("bad.nemo", "folder"):
        with pytest.raises(ConfigError, match=r"common\.pt: it wants to use io\.open"):
            restore(path)
    assert not (tmp_path / "ran").exists()


# ---- archives of NeMo's own model


@pytest.fixture(scope="module")
def of_nemo(tiny_hf, tiny_nemo, tmp_path_factory):
    """Archive, logits and key names of a model that NeMo built from megatron-core's local layers: LayerNorm, learned
    positions, GELU, biases, as many key/value heads as query heads."""
    cfg = load_checkpoint_model_config(str(tiny_nemo))
    with open_dict(cfg):
        cfg.pop("target")
        cfg.update(
            transformer_engine=False, normalization="layernorm", bias=True, activation="gelu", num_query_groups=4,
            position_embedding_type="learned_absolute", masked_softmax_fusion=False, dist_ckpt_format="zarr",
            perform_initialization=True, init_method_std=0.2,
        )  # fmt: skip
        cfg.tokenizer = {"library": "huggingface", "type": str(tiny_hf), "use_fast": True}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(megatron_gpt_model, "get_specs", lambda *args: get_gpt_layer_local_spec())
        torch.manual_seed(3)
        model = MegatronGPTModel(cfg, make_trainer())
    with torch.no_grad():
        for value in model.parameters():  # otherwise norms and biases would be ones and zeros
            value.add_(0.1 * torch.randn_like(value))
    path = tmp_path_factory.mktemp("nemo") / "plain.nemo"
    model.save_to(str(path))
    return path, logits_of(model), sharded_names(model)


def logits_of(model) -> torch.Tensor:
    """Logits [2, 12, V] of fixed tokens, with an explicit causal mask."""
    gpt = model.get_model_module_list()[0].eval()
    tokens = torch.arange(24).reshape(2, 12) % 300
    blocked = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(diagonal=1)
    with torch.no_grad():
        return gpt(tokens, torch.arange(12).expand(2, 12), blocked)


def sharded_names(model) -> set[str]:
    """Names under which the model's tensors are stored."""

    def leaves(tree):
        if isinstance(tree, dict):
            tree = list(tree.values())
        return [leaf for branch in tree for leaf in leaves(branch)] if isinstance(tree, list) else [tree]

    tensors = (ShardedTensor, ShardedTensorFactory)
    return {leaf.key for leaf in leaves(model.sharded_state_dict()) if isinstance(leaf, tensors)}


def test_an_archive_of_nemo_restores_with_equal_logits(of_nemo):
    path, logits, _ = of_nemo
    cfg = load_checkpoint_model_config(str(path))
    with open_dict(cfg):
        cfg.rs = rs_config()
    model = restore(path, cfg)
    # Fused and unfused attention round differently in float32; logits are of order 10.
    torch.testing.assert_close(logits_of(model), logits, atol=1e-4, rtol=0)
    assert logits.std() > 1


def test_names_on_disk_are_those_of_transformer_engine(of_nemo, saved):
    path, _, names_of_nemo = of_nemo
    cfg = load_checkpoint_model_config(str(path))
    with open_dict(cfg):
        cfg.rs = rs_config()
    with_biases = sharded_names(restore(path, cfg))
    layer = {
        "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight", "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }  # fmt: skip
    around = {"model.embedding.word_embeddings.weight", "model.decoder.final_layernorm.weight"}
    llama = {f"model.decoder.layers.{name}" for name in layer} | around
    biases = {name.removesuffix("weight") + "bias" for name in llama if "embedding" not in name}
    assert sharded_names(restore(saved[0])) == llama
    assert with_biases == llama | biases | {"model.embedding.position_embeddings.weight"} == names_of_nemo
