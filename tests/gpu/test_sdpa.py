"""Which kernel torch chooses for attention on a GPU, on its own and through `compat.sdpa`."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from nemo_aligner.compat import sdpa


def random_qkv(num_heads: int = 16, num_groups: int = 16):
    """Half-precision inputs for which torch was seen to choose cuDNN: 16 rows, a length that is not a power of two."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(16, heads, 100, 128) for heads in (num_heads, num_groups, num_groups)]
    return [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]


@pytest.fixture
def chosen(monkeypatch):
    """chosen(): the kernels that torch chose for its operator since the previous chosen()."""
    found, operator = [], F.scaled_dot_product_attention

    def recording(query, key, value, **more):
        found.append(SDPBackend(torch._fused_sdp_choice(query, key, value, **more)))
        return operator(query, key, value, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)

    def take():
        taken, found[:] = found[:], []
        return taken

    return take


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs Hopper")
def test_torch_still_prefers_cudnn():
    """When this fails, check whether torch chooses cuDNN for any other shape; if not, compat/sdpa.py can go."""
    choice = torch._fused_sdp_choice(*random_qkv(), is_causal=True)
    assert SDPBackend(choice) == SDPBackend.CUDNN_ATTENTION


def test_we_do_not(chosen):
    query, key, value = random_qkv()
    ours = sdpa.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert chosen() == [SDPBackend.FLASH_ATTENTION]
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    assert (ours.double() - exact).norm() <= 5e-3 * exact.norm()
    chosen()
    mask = torch.ones(100, 100, dtype=torch.bool, device="cuda").tril()
    masked = sdpa.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert chosen() == [SDPBackend.EFFICIENT_ATTENTION]
    assert (masked.double() - exact).norm() <= 5e-3 * exact.norm()
    sdpa.scaled_dot_product_attention(*random_qkv(16, 4), is_causal=True, enable_gqa=True)
    assert chosen() == [SDPBackend.FLASH_ATTENTION]


def test_a_mask_with_grouped_queries_still_has_no_other_kernel():
    """When this fails, compat/sdpa.py can do without its exception."""
    mask = torch.ones(100, 100, dtype=torch.bool, device="cuda").tril()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        choice = torch._fused_sdp_choice(*random_qkv(16, 4), attn_mask=mask, enable_gqa=True)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert SDPBackend(choice) == SDPBackend.MATH
