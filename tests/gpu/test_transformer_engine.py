"""Transformer Engine's layers, where it is installed: NeMo builds them, and they are used to train and generate.

With Transformer Engine, all other tests in this folder that load a model also use these layers, except tests of our own
layers (`own_layers`).
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
from transformers import LlamaForCausalLM

from nemo_aligner.generation.rollouts import GenerationSettings, RolloutGenerator
from tests.gpu.test_packing import SETTINGS, load_in_bfloat16, training_step
from tests.tiny import load_actor
from tests.unit.test_engine import batch_of, ragged_prompts, responses_of
from tests.unit.test_loss import hf_logprobs, hf_training_step, make_batch, token_loss
from tests.unit.test_packing import ROWS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)


@pytest.fixture(scope="module")
def actor(tiny_nemo):
    """Loaded from an archive that was written on a CPU without Transformer Engine."""
    return load_actor(tiny_nemo, rs={"length_params.max_length": 32, "sampling_params.end_strings": []}, **SETTINGS)


def test_nemo_builds_the_layers(actor):
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer.transformer_layer import TransformerLayer

    assert megatron_gpt_model.get_specs.__module__ == megatron_gpt_model.__name__
    for layer in actor.model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        assert type(layer) is TransformerLayer
        assert type(attention.linear_qkv) is type(mlp.linear_fc1) is transformer_engine.TELayerNormColumnParallelLinear
        assert type(attention.linear_proj) is type(mlp.linear_fc2) is transformer_engine.TERowParallelLinear
        assert type(attention.core_attention) is transformer_engine.TEDotProductAttention
    assert type(actor.model.decoder.final_layernorm).__module__.startswith("transformer_engine.")


def test_they_are_restored_bit_for_bit(actor, tmp_path):
    actor.save_to(str(tmp_path / "model.nemo"))
    restored = load_actor(tmp_path / "model.nemo")
    for (name, expected), found in zip(actor.named_parameters(), restored.parameters(), strict=True):
        assert torch.equal(found, expected), name


def training_step_of_hf(tiny_hf, gpt_model, dtype: torch.dtype):
    """(loss, gradients) of the weights rounded to bfloat16, computed in `dtype`."""
    model = LlamaForCausalLM.from_pretrained(tiny_hf, torch_dtype=torch.bfloat16).to(dtype).cuda().eval()
    batch = {key: value.cuda() for key, value in make_batch(ROWS).items()}
    loss = token_loss(hf_logprobs(model, batch["response_tokens"]), batch["mask"])
    return hf_training_step(model, SimpleNamespace(model=gpt_model), loss)


def test_training_in_bfloat16_is_as_exact_as_hugging_face(tiny_nemo, tiny_hf, record_property, log_lines):
    actor = load_in_bfloat16(tiny_nemo, "O2")
    loss, gradients = training_step(actor, packing=True)
    assert "training: packing does not support TEDotProductAttention; falling back to padded rows" in "\n".join(
        log_lines
    )
    (gpt_model,) = actor.get_model_module_list()
    exact, of_hf = (training_step_of_hf(tiny_hf, gpt_model, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert loss == pytest.approx(exact[0], rel=1e-2)  # bfloat16 has 8 bits, and logits reach 20
    errors = []
    for name, gradient in exact[1].items():
        assert gradient.norm() > 0
        errors.append([((of[name] - gradient).norm() / gradient.norm()).item() for of in (gradients, of_hf[1])])
    ours, theirs = torch.tensor(errors).norm(dim=0).tolist()
    record_property("error", ours)
    record_property("of Hugging Face", theirs)
    assert 0 < ours <= 1.25 * theirs  # up to chance; ours keeps sums in float32 longer


def test_both_backends_generate_with_them(actor, monkeypatch, log_lines):
    """That they generate the same as Hugging Face is tested in test_engine.py."""
    actor.prepare_for_inference()
    found = {}
    for backend in ("engine", "nemo"):
        generator = RolloutGenerator(actor, GenerationSettings(backend))
        monkeypatch.setattr(actor, "_rollout_generator", generator)
        found[backend] = responses_of(actor.infer(batch_of(actor, ragged_prompts(24))))
        assert (generator._engine is not None) == (backend == "engine")
    actor.finish_inference()
    assert found["engine"] == found["nemo"]
    assert len({tuple(row) for row in found["engine"]}) > 2
