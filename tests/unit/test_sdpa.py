"""Which of torch's kernels attention may choose from: the choice is made on a GPU, but limits are set on a CPU too."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.nn import functional as F

from nemo_aligner.compat.sdpa import scaled_dot_product_attention
from nemo_aligner.models.nlp.gpt.packed_attention import PackedSequences, packed_attention
from tests.unit.test_layer_spec import attention, random_qkv

OURS, TORCHS = ["flash", "math", "mem_efficient"], ["cudnn", "flash", "math", "mem_efficient"]


def allowed() -> list[str]:
    return [name for name in TORCHS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]


@pytest.fixture
def choices(monkeypatch):
    """The kernels that each call of torch's operator could choose from."""
    found, operator = [], F.scaled_dot_product_attention

    def recording(*args, **more):
        found.append(allowed())
        return operator(*args, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    return found


def test_attention_is_computed_by_any_kernel_but_cudnns(choices):
    query, key, value = random_qkv()
    assert allowed() == TORCHS
    attention()(query, key, value, None)
    attention()(query[:1], key, value, None, attn_mask_type=AttnMaskType.no_mask)
    packed_attention(query[:, 0], key[:, 0], value[:, 0], PackedSequences.of([3, 2]), dropout=0.0)
    blocked = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (query, query, query)), attn_mask=~blocked)
    assert choices == [OURS] * 5 and allowed() == TORCHS


def test_a_mask_with_grouped_queries_has_no_other_kernel(choices):
    query, key, value = random_qkv()
    attention()(query, key, value, torch.ones(5, 5, dtype=torch.bool).triu(1).repeat(2, 1, 1, 1))
    assert choices == [TORCHS]


@pytest.mark.parametrize("was_enabled", [True, False])
def test_what_others_may_choose_is_left_as_it_was(choices, was_enabled):
    query, key, value = random_qkv()
    torch.backends.cuda.enable_cudnn_sdp(was_enabled)
    try:
        before = allowed()
        assert ("cudnn" in before) == was_enabled
        attention()(query, key, value, None)
        attention()(query, key, value, torch.zeros(1, 1, 5, 5, dtype=torch.bool))
        with pytest.raises(RuntimeError, match="dropout"):
            scaled_dot_product_attention(query, query, query, dropout_p=-1.0)
        assert choices == [OURS, before, OURS] and allowed() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
