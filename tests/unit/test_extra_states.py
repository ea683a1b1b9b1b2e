"""Extra states like those of Transformer Engine's modules, present in or absent from an archive's weights."""

import pickle
import re

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from nemo.collections.nlp.models.language_modeling import megatron_gpt_model

from nemo_aligner.compat import extra_states
from nemo_aligner.models.nlp.gpt.layer_spec import Layer, Norm, ScaledDotProductAttention, get_block_spec
from nemo_aligner.testing.utils import Utils
from nemo_aligner.utils import utils
from nemo_aligner.utils.errors import ConfigError
from tests.tiny import load_actor

MISSING = r"the object model\.decoder\.layers{}\._extra_state/shard_0_4 is missing from the weights \(and 3 more\)"


@pytest.fixture(scope="module", autouse=True)
def no_groups_left_behind():
    yield
    Utils.destroy_model_parallel()


def with_state(kind: type, *content: int) -> type:
    """The module like Transformer Engine's: its extra state holds bytes, or is empty where nothing is in FP8."""

    class WithState(kind):
        state = torch.tensor(content, dtype=torch.uint8)

        def get_extra_state(self):
            return self.state

        def set_extra_state(self, state):
            self.state = state

    return WithState


@pytest.fixture
def load(tiny_nemo, monkeypatch):
    """The actor loaded from an archive, with these modules in its layers."""

    def load(path=tiny_nemo, final_norm=Norm, attention=ScaledDotProductAttention, layer=Layer):
        def get_specs(spec_name, config, *args):
            spec = get_block_spec(config)
            spec.layer_norm = final_norm
            spec.layer_specs[0].module = layer  # shared by all layers
            spec.layer_specs[0].submodules.self_attention.submodules.core_attention = attention
            return spec

        monkeypatch.setattr(megatron_gpt_model, "get_specs", get_specs)
        return load_actor(path)

    return load


def states_of(actor) -> dict[str, list[int]]:
    return {name: module.state.tolist() for name, module in actor.model.named_modules() if hasattr(module, "state")}


@pytest.mark.parametrize("dist_ckpt_format", ["torch_dist", "zarr"])
def test_empty_states_of_attention_and_norm_are_restored_if_stored_and_kept_if_not(load, tmp_path, dist_ckpt_format):
    modules = {"attention": with_state(ScaledDotProductAttention), "final_norm": with_state(Norm)}
    plain = load()
    actor = load(**modules)
    for (name, expected), found in zip(plain.named_parameters(), actor.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert list(states_of(actor).values()) == [[]] * 5  # of the four layers and the final norm
    saved = {part.key for part in nested_values(actor.sharded_state_dict()) if isinstance(part, ShardedObject)}
    assert "model.decoder.final_layernorm._extra_state" in saved  # although empty

    for number, module in enumerate(module for module in actor.model.modules() if hasattr(module, "state")):
        module.state = torch.tensor(list(pickle.dumps(number)), dtype=torch.uint8)  # as Transformer Engine does
    actor.cfg.dist_ckpt_format = dist_ckpt_format
    actor.save_to(str(tmp_path / "with_states.nemo"))
    assert states_of(load(tmp_path / "with_states.nemo", **modules)) == states_of(actor)


def test_megatron_still_fails_where_a_state_is_missing(load, monkeypatch):
    monkeypatch.setattr(extra_states, "_NOT_ALWAYS_WRITTEN", re.compile("none"))
    monkeypatch.setattr(utils, "check_model", lambda *args, **kwargs: None)
    with pytest.raises(ConfigError, match=r"the weights cannot be loaded \(.*core_attention\._extra_state"):
        load(attention=with_state(ScaledDotProductAttention))


def test_a_state_that_is_not_empty_is_never_left_out(load):
    with pytest.raises(ConfigError, match=MISSING.format(r"\.self_attention\.core_attention")):
        load(attention=with_state(ScaledDotProductAttention, 1, 2))


def test_states_of_other_modules_must_be_stored(load):
    with pytest.raises(ConfigError, match=MISSING.format("")):
        load(layer=with_state(Layer))
