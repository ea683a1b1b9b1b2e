"""The stand-ins for packages that are not installed: only where something is missing, once, and only while needed."""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from megatron.core import ModelParallelConfig
from megatron.core.dist_checkpointing import validation
from megatron.core.dist_checkpointing.strategies import async_utils, common, filesystem_async
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import get_cuda_rng_tracker, layers, model_parallel_cuda_manual_seed
from megatron.core.transformer.torch_layer_norm import WrappedTorchLayerNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.nlp.models import nlp_model
from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
from nemo.collections.nlp.modules.common.megatron import build_model, megatron_init, utils
from nemo.collections.nlp.parts import nlp_overrides
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.core.optim import optimizer_with_main_params
from nemo.utils import exp_manager
from omegaconf import OmegaConf
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from transformers import AddedToken, AutoTokenizer

from nemo_aligner import compat
from nemo_aligner.compat import (
    communicators,
    cpu,
    cpu_linear,
    device,
    log_noise,
    no_apex,
    no_transformer_engine,
    numpy_version,
    torch_version,
)
from nemo_aligner.models.nlp.gpt.hf_tokenizer import load_tokenizer
from nemo_aligner.models.nlp.gpt.layer_spec import Norm
from nemo_aligner.testing.utils import Utils
from tests.tiny import save_tokenizer

compat.apply()

without_apex = pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="Apex is installed")
without_te = pytest.mark.skipif(megatron_gpt_model.HAVE_TE, reason="Transformer Engine is installed")
on_cpu = pytest.mark.skipif(not device.on_cpu(), reason="the suite runs on a GPU")

# Every name that a stand-in replaces.
APEX_NAMES = (
    (nlp_overrides, "McoreDistributedOptimizer"),
    (nlp_overrides, "MegatronDistributedFusedAdam"),
    (optimizer_with_main_params, "HAVE_APEX"),
    (build_model, "set_defaults_if_not_set_tensor_model_parallel_attributes"),
    (utils, "listify_model"),
    (utils, "FusedLayerNorm"),
    (utils, "MixedFusedRMSNorm"),
    (utils, "FastLayerNorm"),
)
TE_NAMES = (
    (nlp_model, "get_megatron_pretrained_bert_models"),
    (megatron_gpt_model, "get_specs"),
    (utils, "MixedFusedRMSNorm"),
)


def replaced_by(apply, names, monkeypatch) -> list[bool]:
    """Which of the names `apply` replaces."""
    original = object()
    for module, name in names:
        monkeypatch.setattr(module, name, original, raising=False)
    apply()
    return [getattr(module, name) is not original for module, name in names]


# ---- only where something is missing


@pytest.mark.parametrize("is_there", [True, False])
def test_apex_is_replaced_only_if_missing(monkeypatch, is_there):
    monkeypatch.setattr(nlp_overrides, "HAVE_APEX", is_there)
    assert set(replaced_by(no_apex.apply, APEX_NAMES, monkeypatch)) == {not is_there}
    assert nlp_overrides.HAVE_APEX


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("is_there", [True, False])
def test_transformer_engine_is_replaced_only_if_missing_or_on_a_cpu(monkeypatch, is_there, on_cpu):
    monkeypatch.setattr(megatron_gpt_model, "HAVE_TE", is_there)
    monkeypatch.setattr(device, "_on_cpu", on_cpu)
    assert set(replaced_by(no_transformer_engine.apply, TE_NAMES, monkeypatch)) == {on_cpu or not is_there}


@pytest.mark.parametrize("version", ["24.07", None])
def test_the_version_of_nvidia_s_container_is_set_only_if_missing(monkeypatch, version):
    monkeypatch.delenv("NVIDIA_PYTORCH_VERSION", raising=False)
    if version is not None:
        monkeypatch.setenv("NVIDIA_PYTORCH_VERSION", version)
    monkeypatch.setattr(megatron_gpt_model, "HAVE_TE", True)  # this says nothing about the container
    no_transformer_engine.apply()
    assert os.environ["NVIDIA_PYTORCH_VERSION"] == (version or "")


def write_item_of_torch_2_6(stream, data, write_item, storage_key):
    return ("2.6", stream, data, write_item, storage_key)


def write_item_of_torch_2_7(transforms, stream, data, write_item, storage_key):
    return ("2.7", type(transforms).__name__, stream, data, write_item, storage_key)


def write_item_of_torch_2_9(transforms, stream, data, write_item, storage_key, serialization_format):
    return ("2.9", type(transforms).__name__, stream, data, write_item, storage_key, serialization_format.name)


@pytest.mark.parametrize(
    "writer, written",
    [
        (write_item_of_torch_2_6, ("2.6", 1, 2, 3, 4)),
        (write_item_of_torch_2_7, ("2.7", "_StorageWriterTransforms", 1, 2, 3, 4)),
        (write_item_of_torch_2_9, ("2.9", "_StorageWriterTransforms", 1, 2, 3, 4, "TORCH_SAVE")),
    ],
)
def test_the_checkpoint_writer_fits_every_torch(monkeypatch, writer, written):
    monkeypatch.setattr(filesystem, "_write_item", writer)
    monkeypatch.setattr(filesystem_async, "_write_item", writer)
    torch_version.apply()
    assert (filesystem_async._write_item is writer) == (writer is write_item_of_torch_2_6)
    assert filesystem_async._write_item(1, 2, 3, 4) == written


def test_metadata_that_torch_copies_keeps_what_megatron_core_added(monkeypatch):
    def finish(self, metadata, results):
        return filesystem.dataclasses.replace(metadata, version="2.11")

    monkeypatch.setattr(filesystem._FileSystemWriter, "finish", finish)
    monkeypatch.setattr(filesystem, "dataclasses", dataclasses, raising=False)
    metadata = Metadata({})
    metadata.mcore_data = {"key": "shape"}
    assert not hasattr(finish(None, metadata, []), "mcore_data")
    torch_version.apply()
    assert finish(None, metadata, []).mcore_data == {"key": "shape"}
    assert finish(None, metadata, []).version == "2.11"


def test_numpy_2_gets_back_the_name_that_megatron_core_calls(monkeypatch):
    monkeypatch.delattr(np, "product", raising=False)
    numpy_version.apply()
    assert np.product((2, 3)) == 6
    assert "np.product(" in inspect.getsource(validation), "megatron-core no longer calls it"


# ---- once


def everything_that_is_replaced() -> list:
    return [
        *(getattr(module, name, None) for module, name in APEX_NAMES),
        filesystem_async._write_item, megatron_init._set_random_seed, schedules.torch, torch.Tensor.cuda,
        torch.cuda.current_device, nlp_overrides.HAVE_APEX, list(log_noise_filters()),
        layers.linear_with_grad_accumulation_and_async_allreduce, torch.distributed.new_group,
    ]  # fmt: skip


def log_noise_filters():
    from nemo.utils import logging as nemo_logging

    return (found for found in nemo_logging._logger.filters if isinstance(found, log_noise._DropNoise))


def test_applying_again_changes_nothing():
    before = everything_that_is_replaced()
    compat.apply()
    assert everything_that_is_replaced() == before
    assert len(list(log_noise_filters())) == 1


@on_cpu
def test_enabling_the_cpu_again_changes_nothing():
    before = everything_that_is_replaced()
    cpu.enable()
    cpu.redirect_nemo()
    assert everything_that_is_replaced() == before


# ---- only while needed: each of these tests fails once a stand-in can be removed

PROBE = """
import importlib.util, inspect, json, os, re
import torch
from nemo.collections.common.tokenizers.huggingface import auto_tokenizer
from nemo.collections.nlp.models import nlp_model
from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
from nemo.collections.nlp.modules.common.megatron import build_model, megatron_init, utils
from nemo.collections.nlp.parts import nlp_overrides
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.core.classes import modelPT

def error_of(function, *args):
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__

model = torch.nn.Linear(2, 2)
print("PROBED " + json.dumps({
    "strategy": error_of(nlp_overrides.NLPDDPStrategy),
    "optimizer classes": [name for name in ("McoreDistributedOptimizer", "MegatronDistributedFusedAdam")
                          if hasattr(nlp_overrides, name)],
    "build_model": error_of(build_model._build_model if hasattr(build_model, "_build_model") else
                            lambda: build_model.set_defaults_if_not_set_tensor_model_parallel_attributes),
    "weight decay": error_of(utils.get_params_for_weight_decay_optimization, [model]),
    "bert models": error_of(nlp_model.get_megatron_pretrained_bert_models),
    "layer spec": error_of(megatron_gpt_model.get_specs, "", None, False),
    "container version": error_of(megatron_gpt_model.MegatronGPTModel._enable_nvidia_optimizations, model),
    "writer": inspect.signature(filesystem_async._write_item).parameters.__contains__("transforms"),
    "cuda in schedules": '"cuda"' in inspect.getsource(schedules),
    "cuda of ModelPT": "cuda" in vars(modelPT.ModelPT),
    "seeds need a GPU": "device_count() > 0" in inspect.getsource(megatron_init._set_random_seed),
    "random states are CUDA's": "torch.cuda" in inspect.getsource(random._set_cuda_rng_state),
    "virtual stages": "only supported when using megatron_amp_O2" in inspect.getsource(
        megatron_gpt_model.MegatronGPTModel.__init__),
    "DDP": "DistributedDataParallel(" in inspect.getsource(nlp_overrides.NLPDDPStrategy.configure_ddp),
    "looks tokens up": "self.tokens_to_ids(tokens)" in inspect.getsource(auto_tokenizer.AutoTokenizer.text_to_ids),
    "asks for special tokens": "if t not in self.tokenizer.all_special_tokens]" in inspect.getsource(
        auto_tokenizer.AutoTokenizer.ids_to_text),
    **specs(),
}))
"""
# The layer specs that NeMo chooses from, by name, with and without our stand-in.
PROBE = (
    """
import sys, types

def specs():
    package = "nemo.collections.nlp.models.language_modeling.megatron.gemma2.gemma2_spec"
    sys.modules[package] = types.SimpleNamespace(get_gemma2_layer_spec=lambda: "gemma")
    for name in vars(megatron_gpt_model).copy():
        if name.startswith("get_") and name.endswith("_spec"):
            setattr(megatron_gpt_model, name, lambda *args, name=name: name)
    from nemo_aligner.compat import no_transformer_engine
    no_transformer_engine._keep_weight_decay_off_own_norm = lambda: None
    found = {}
    for is_there in (True, False):
        megatron_gpt_model.HAVE_TE = is_there
        no_transformer_engine.apply()
        found[f"get_specs {is_there}"] = megatron_gpt_model.get_specs.__module__
        if is_there:
            found["with"], found["off"] = (megatron_gpt_model.get_specs("", None, use) for use in (True, False))
            of_nemo = megatron_gpt_model.get_specs
    megatron_gpt_model.HAVE_TE, megatron_gpt_model.get_specs = True, of_nemo
    from nemo_aligner.compat import cpu
    cpu.enable()
    found["get_specs on a CPU"] = megatron_gpt_model.get_specs.__module__
    return found
"""
    + PROBE
)


@pytest.fixture(scope="module")
def bare():
    """What NeMo, megatron-core and torch do in a process without this library."""
    environment = {key: value for key, value in os.environ.items() if key != "NVIDIA_PYTORCH_VERSION"}
    process = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, timeout=300
    )
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("PROBED ")] or [process.stderr[-2000:]]
    return json.loads(line.removeprefix("PROBED "))


@without_apex
@pytest.mark.parametrize(
    "what, found",
    [
        ("strategy", "ImportError"), ("optimizer classes", []), ("build_model", "AttributeError"),
        ("weight decay", "NameError"),
    ],
)  # fmt: skip
def test_nemo_still_needs_apex(bare, what, found):
    assert bare[what] == found


@without_te
@pytest.mark.parametrize("what, found", [("bert models", "NameError"), ("layer spec", "ModuleNotFoundError")])
def test_nemo_still_needs_transformer_engine(bare, what, found):
    assert bare[what] == found


def test_with_transformer_engine_nemo_chooses_the_spec(bare):
    assert bare["with"] == "get_gpt_layer_with_transformer_engine_spec"
    assert bare["off"] == "get_gpt_layer_local_spec"  # model.transformer_engine: False, although it is installed
    assert bare["get_specs True"] == megatron_gpt_model.__name__
    assert bare["get_specs False"] == no_transformer_engine.__name__


def test_on_a_cpu_the_spec_is_our_own_though_transformer_engine_is_installed(bare):
    assert bare["get_specs on a CPU"] == no_transformer_engine.__name__


def test_virtual_stages_without_O2_still_need_their_stand_ins(bare):
    assert bare["virtual stages"] and bare["DDP"]


def _recorder(calls: list, kind: str):
    """A stand-in for `isend` and `irecv`, which name the argument for the peer differently."""
    return lambda tensor, peer=None, group=None, **peers: calls.append((kind, group, tensor))


@pytest.mark.parametrize("exchange", [p2p_communication._batched_p2p_ops, p2p_communication._p2p_ops])
def test_batched_messages_between_two_stages_are_still_confused(monkeypatch, exchange):
    """Between two ranks, the sends and receives of a group are matched by their order."""
    distributed, calls = torch.distributed, {0: [], 1: []}
    monkeypatch.setattr(p2p_communication, "get_pipeline_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "P2POp", lambda op, tensor, peer, group: op(tensor, peer, group))
    monkeypatch.setattr(distributed, "batch_isend_irecv", lambda ops: [])
    for rank, own in calls.items():
        monkeypatch.setattr(p2p_communication, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            distributed, "isend", lambda tensor, dst, group, own=own: own.append(("send", group, tensor))
        )
        monkeypatch.setattr(
            distributed, "irecv", lambda tensor, src, group, own=own: own.append(("take", group, tensor))
        )
        exchange(
            tensor_send_prev="gradient", tensor_recv_prev="activation", tensor_send_next="activation",
            tensor_recv_next="gradient", group="pipeline", prev_pipeline_rank=1 - rank, next_pipeline_rank=1 - rank,
        )  # fmt: skip

    def tensors(rank, kind, group):
        return [tensor for what, where, tensor in calls[rank] if (what, where) == (kind, group)]

    is_right = [
        tensors(rank, "send", group) == tensors(1 - rank, "take", group)
        for rank in (0, 1) for group in ("pipeline", distributed.group.WORLD)
    ]  # fmt: skip
    assert sum(len(own) for own in calls.values()) == 8
    assert all(is_right) == (exchange is p2p_communication._p2p_ops)


def test_nemo_still_needs_the_version_of_a_container(bare):
    assert bare["container version"] == "TypeError"


def test_megatron_still_calls_the_writer_of_an_older_torch(bare):
    assert bare["writer"]
    assert "_write_item(stream, " in inspect.getsource(filesystem_async)


class Evil:
    def __reduce__(self):
        return open, ("ran", "w")


def test_torch_still_runs_pickles_of_checkpoints(tmp_path, monkeypatch):
    """Both kinds of pickles that no caller's argument can make safe; hence `checkpoint_pickles` reads them first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with contextlib.suppress(AttributeError):  # the code that it ran returned no metadata
        filesystem.FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    content = io.BytesIO()
    torch.save(Evil(), content)
    content.seek(0)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    planner.load_bytes(types.SimpleNamespace(dest_index=MetadataIndex("extra")), content)
    assert (tmp_path / "ran").exists()


def test_megatron_and_nemo_still_leave_it_to_torch_what_pickles_may_do():
    assert "weights_only" not in inspect.getsource(common.TorchCommonLoadStrategy)
    assert "weights_only" not in inspect.getsource(SaveRestoreConnector._load_state_dict_from_disk)


@pytest.mark.parametrize(
    "what", ["cuda in schedules", "cuda of ModelPT", "seeds need a GPU", "random states are CUDA's"]
)
def test_the_libraries_still_name_cuda_outright(bare, what):
    assert bare[what]


# ---- that the stand-ins do what they replace


@without_te
def test_weight_decay_leaves_norms_and_biases_alone():
    rms = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, normalization="RMSNorm")
    layer = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, normalization="LayerNorm")
    model = torch.nn.ModuleDict(
        {
            "linear": torch.nn.Linear(8, 8),
            "rms": Norm(rms, 8),
            "layer": Norm(layer, 8),
            "of megatron": WrappedTorchLayerNorm(layer, 8),
        }
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = utils.get_params_for_weight_decay_optimization([model])
    assert [names[id(parameter)] for parameter in decayed["params"]] == ["linear.weight"]
    assert "weight_decay" not in decayed and spared["weight_decay"] == 0
    assert {names[id(parameter)] for parameter in spared["params"]} == set(names.values()) - {"linear.weight"}


@without_apex
def test_no_optimizer_is_taken_for_apex_s():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert not isinstance(optimizer, nlp_overrides.MegatronDistributedFusedAdam)


@without_te
def test_another_layer_spec_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model\.name: the layer spec 'te_gpt_hyena' needs Transformer Engine"):
        megatron_gpt_model.get_specs("te_gpt_hyena", None, True)


@on_cpu
def test_random_states_are_tracked_on_the_cpu():
    Utils.initialize_model_parallel()
    model_parallel_cuda_manual_seed(5)
    torch.manual_seed(1)

    def draw():
        return torch.rand(3).tolist()

    outside = [draw(), draw(), draw()]
    torch.manual_seed(1)
    woven = [draw()]
    with get_cuda_rng_tracker().fork():
        first_inside = draw()
    woven.append(draw())
    with get_cuda_rng_tracker().fork():
        second_inside = draw()
    woven.append(draw())
    assert woven == outside  # the fork does not advance the outer stream
    assert first_inside != second_inside and first_inside not in outside
    model_parallel_cuda_manual_seed(5)
    with get_cuda_rng_tracker().fork():
        assert draw() == first_inside
    Utils.destroy_model_parallel()


@on_cpu
def test_names_of_cuda_lead_to_the_cpu():
    assert device.current_device() == torch.device("cpu") == torch.cuda.current_device()
    assert torch.zeros(1).cuda().device.type == "cpu"
    assert torch.nn.Linear(1, 1).cuda().weight.device.type == "cpu"
    assert schedules.torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.cuda.LongTensor([1]).dtype == torch.int64
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.Event().record()
    torch.cuda.synchronize()


@on_cpu
def test_the_absence_of_a_gpu_stays_visible():
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0


def test_log_lines_without_use_are_dropped():
    keep = log_noise._DropNoise().filter
    record = functools.partial(logging.LogRecord, "nemo", logging.WARNING, __file__, 1, args=(), exc_info=None)
    assert not keep(record(msg="The model: GPT() does not have field.name: tp_only_amax_red in its cfg."))
    assert keep(record(msg="the validation set has 3 prompts"))


@pytest.fixture
def groups():
    Utils.initialize_model_parallel()
    yield
    Utils.destroy_model_parallel()


@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear"])
def test_megatrons_linear_layers_do_not_warn_of_themselves(groups, kind):
    config = ModelParallelConfig(use_cpu_initialization=True, params_dtype=torch.bfloat16)
    options = {"input_is_parallel": True} if kind == "RowParallelLinear" else {}
    layer = getattr(layers, kind)(
        6, 5, config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=False, **options
    )
    inputs = torch.randn(4, 2, 6).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, _ = layer(inputs)
    assert torch.equal(output, torch.nn.functional.linear(inputs, layer.weight))


def test_megatrons_linear_layers_still_give_a_deprecated_argument():
    """If this fails, compat/log_noise.py has nothing left to filter out."""
    assert "async_grad_allreduce=allreduce_dgrad" in inspect.getsource(layers.RowParallelLinear)


@pytest.mark.parametrize(("ranks", "bound"), [([3], None), ([0, 3], "cuda:3"), (None, "cuda:3")])
def test_groups_of_one_rank_are_not_connected_when_they_are_created(monkeypatch, ranks, bound):
    world = types.SimpleNamespace(bound_device_id="cuda:3")
    seen = []
    monkeypatch.setattr(torch.distributed.distributed_c10d._world, "_default_pg", world, raising=False)
    monkeypatch.setattr(torch.distributed, "new_group", lambda ranks, **_: seen.append((ranks, world.bound_device_id)))
    communicators.apply()
    torch.distributed.new_group(ranks, timeout=None)
    assert seen == [(ranks, bound)] and world.bound_device_id == "cuda:3"


def test_lightning_still_binds_process_groups_to_a_device():
    """If this fails, torch no longer connects groups on creation, and compat/communicators.py can be deleted."""
    assert 'kwargs["device_id"] = self.root_device' in inspect.getsource(DDPStrategy.setup_distributed)


STRIPPED = "the quick <extra_id_1>  brown <|im end|> fox<extra_id_1>"


@pytest.fixture(params=[True, False], ids=["special", "added"])
def stripping(request, tmp_path):
    """NeMo's wrapper of a tokenizer whose added tokens strip the blanks next to them, and that tokenizer itself."""
    own = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    right, both = AddedToken("<extra_id_1>", rstrip=True), AddedToken("<|im end|>", lstrip=True, rstrip=True)
    if request.param:
        own.add_special_tokens({"additional_special_tokens": [right, both]})
    else:
        own.add_tokens([right, both])
    own.save_pretrained(tmp_path)
    return load_tokenizer(tmp_path), own


def test_tokens_that_take_blanks_along_are_as_in_transformers(stripping):
    wrapper, own = stripping
    ids = wrapper.text_to_ids(STRIPPED)
    assert ids == own.encode(STRIPPED, add_special_tokens=False)
    assert ids.count(own.convert_tokens_to_ids("<extra_id_1>")) == 2
    assert wrapper.ids_to_text(ids) == own.decode(ids, skip_special_tokens=True)


def test_nemo_still_looks_up_such_tokens_with_their_blanks(bare, stripping):
    """If this fails, transformers names the token without blanks, or NeMo asks for ids; delete compat/token_ids.py."""
    wrapper, _ = stripping
    assert None in wrapper.tokens_to_ids(wrapper.text_to_tokens(STRIPPED))
    assert bare["looks tokens up"]


def test_special_tokens_are_asked_for_once_a_text(tmp_path, monkeypatch):
    wrapper = load_tokenizer(save_tokenizer(tmp_path))
    own, asked = wrapper.tokenizer, []
    special = own.all_special_tokens
    monkeypatch.setattr(type(own), "all_special_tokens", property(lambda self: asked.append(self) or special))
    ids = list(range(len(own)))
    assert wrapper.ids_to_text(ids) == own.decode(ids, skip_special_tokens=True)
    assert len(asked) == 1 and set(own.all_special_ids) < set(ids)


def test_nemo_still_asks_for_special_tokens_with_every_token(bare):
    """If this fails, delete `_ids_to_text` of compat/token_ids.py."""
    assert bare["asks for special tokens"]


def test_adam_steps_as_ever_after_a_checkpoint_before_its_first_step():
    def stepped(saves_first: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        if saves_first:
            nlp_overrides.init_optimizer_states(optimizer)
        weight.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
        return weight

    compat.apply()
    assert torch.equal(stepped(True), stepped(False))


def test_writing_and_resuming_still_need_their_stand_ins():
    """If this fails, delete our stand-in.

    Either megatron-core no longer forks to write, or NeMo takes the newest of two last checkpoints.
    """
    assert "get_context('fork')" in inspect.getsource(async_utils) and "Manager()" in inspect.getsource(
        filesystem_async
    )
    assert "Multiple checkpoints {last_checkpoints} that matches" in inspect.getsource(exp_manager)


def test_a_checkpoint_with_a_config_in_it_is_read_without_running_code(tmp_path):
    config = OmegaConf.create({"a": [1, {"b": None}], "c": "${a}"})
    torch.save({"hyper_parameters": config}, tmp_path / "common.pt")
    compat.apply()
    assert torch.load(tmp_path / "common.pt", weights_only=True)["hyper_parameters"] == config


# Matrix products on a CPU


@on_cpu
@pytest.mark.parametrize(("rows", "with_bias"), [(1, False), (32, True), (300, False)])
def test_products_through_onednn_are_those_of_torch(rows, with_bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, 96), (160, 96), (160,)))
    bias = bias if with_bias else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(cpu_linear.linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(cpu_linear.matmul(x[:0], weight.T), torch.zeros(0, 160))
    assert torch.equal(cpu_linear.matmul(x[:, :0], weight[:, :0].T), torch.zeros(rows, 160))
    half = cpu_linear.linear(x.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), x.double() @ weight.double().T, rtol=3e-2, atol=0.3)


@on_cpu
@pytest.mark.parametrize("with_bias", [False, True])
def test_megatrons_linear_layers_train_through_onednn(groups, monkeypatch, with_bias):
    generator = torch.Generator().manual_seed(1)
    layer = layers.RowParallelLinear(
        6, 5, config=ModelParallelConfig(use_cpu_initialization=True), input_is_parallel=True, skip_bias_add=False,
        init_method=lambda weight: torch.nn.init.normal_(weight, generator=generator), bias=with_bias,
    )  # fmt: skip
    if with_bias:
        torch.nn.init.normal_(layer.bias, generator=generator)
    inputs = torch.randn(4, 2, 6, generator=generator, requires_grad=True)
    products = []
    monkeypatch.setattr(
        cpu_linear, "linear", lambda *args, linear=cpu_linear.linear: products.append(args[0].shape) or linear(*args)
    )
    output, _ = layer(inputs)
    output.sin().sum().backward()
    assert products == [(8, 6), (8, 5), (5, 8)]

    tensors = [inputs, *layer.parameters()]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = torch.nn.functional.linear(*exact)
    expected.sin().sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    for tensor, reference in zip(tensors, exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)
