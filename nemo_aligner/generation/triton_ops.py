"""Triton kernels for the operations of a layer other than attention, one pass over memory each; see `torch_ops`.

Legend: M tokens, H hidden size, F MLP size, I inputs and O outputs of a GEMM, Z partial sums of it.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from nemo_aligner.generation.triton_launch import (
    early_launch,
    fetch_into_cache,
    let_next_begin,
    num_multiprocessors,
    shared_memory,
    wait_for_previous,
)
from nemo_aligner.generation.weights import Norm
from nemo_aligner.models.nlp.gpt.activation import Activation

# ---- residual and norm


def add_norm(
    hidden_MH: torch.Tensor, delta_MH: torch.Tensor | None, bias_H: torch.Tensor | None, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `torch_ops.add_norm`, but `hidden_MH` is updated in place; `delta_MH` may be given as partial sums."""
    num_tokens, size = hidden_MH.shape
    num_parts = 0 if delta_MH is None else 1 if delta_MH.dim() == 2 else delta_MH.size(0)
    normed_MH = torch.empty_like(hidden_MH)
    block = triton.next_power_of_2(size)
    _add_norm_kernel[(num_tokens,)](
        hidden_MH, delta_MH, bias_H, norm.weight, norm.bias, normed_MH, size, norm.eps,
        NUM_PARTS=num_parts, HAS_BIAS=bias_H is not None, HAS_NORM_BIAS=norm.bias is not None,
        IS_RMS=norm.is_rms, ZERO_CENTERED=norm.zero_centered, BLOCK=block, num_warps=min(16, max(1, block // 256)),
        **early_launch(hidden_MH.device),
    )  # fmt: skip
    return hidden_MH, normed_MH


@triton.jit
def _add_norm_kernel(
    hidden, delta, bias, weight, norm_bias, normed, size, eps,
    NUM_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, IS_RMS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    start = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        scale += 1.0
    shift, added = tl.zeros_like(scale), tl.zeros_like(scale)
    if HAS_NORM_BIAS:
        shift = tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(EARLY)
    x = tl.load(hidden + start + column, mask=inside, other=0.0).to(tl.float32)
    if NUM_PARTS > 0:
        for part in tl.static_range(NUM_PARTS):
            from_here = delta + part * tl.num_programs(0) * size + start
            x += tl.load(from_here + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + added).to(hidden.dtype.element_ty)
        tl.store(hidden + start + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if not IS_RMS:
        x = tl.where(inside, x - tl.sum(x, axis=0) / size, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps) * scale + shift
    tl.store(normed + start + column, y.to(normed.dtype.element_ty), mask=inside)


# ---- activation


def activate(x_MF: torch.Tensor, activation: Activation) -> torch.Tensor:
    """As `torch_ops.activate`; activations without a kernel here fall back to it."""
    if activation.name is None:
        return _activate_unfused(x_MF, activation)
    num_tokens, size = x_MF.size(0), x_MF.size(1) // (1 + activation.is_gated)
    activated_MF = x_MF.new_empty(num_tokens, size)
    _activate_kernel[(num_tokens, triton.cdiv(size, 1024))](
        x_MF,
        activated_MF,
        size,
        NAME=activation.name,
        IS_GATED=activation.is_gated,
        BLOCK=1024,
        num_warps=4,
    )
    return activated_MF


def _activate_unfused(x_MF: torch.Tensor, activation: Activation) -> torch.Tensor:
    from nemo_aligner.generation import torch_ops

    return torch_ops.activate(x_MF, activation)


@triton.jit
def _activation(gate, NAME: tl.constexpr):
    if NAME == "silu":
        y = gate * tl.sigmoid(gate)
    elif NAME == "gelu":
        y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # 0.5 (1 + tanh(a)) = sigmoid(2 a)
        y = gate * tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))
    return y


@triton.jit
def _activate_kernel(
    x, activated, size, NAME: tl.constexpr, IS_GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    start = x + row * size * (2 if IS_GATED else 1)
    y = _activation(tl.load(start + column, mask=inside, other=0.0).to(tl.float32), NAME)
    if IS_GATED:
        y *= tl.load(start + size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(activated + row * size + column, y.to(activated.dtype.element_ty), mask=inside)


# ---- GEMMs with few rows
#
# They are bound by reading the weight, for which each SM should have one tile of it. cuBLAS computes those for which it
# is as fast, and those that do not fit these tiles.


def product(x_MI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x_MI @ weight_OI.T for `add_norm`: [M, O], or, for a few rows, float32 partial sums, [2, M, O].

    A narrow matrix has too few tiles to occupy every SM unless its inputs are split too (split-K). cuBLAS would add the
    parts in a separate kernel.
    """
    (num_tokens, size_in), size_out = x_MI.shape, weight_OI.size(0)
    if not _fits(x_MI, size_out, _TILE_O, _NUM_PARTS):
        return F.linear(x_MI, weight_OI)
    parts_ZMO = torch.empty(_NUM_PARTS, num_tokens, size_out, dtype=torch.float32, device=x_MI.device)
    _product_kernel[(size_out // _TILE_O, _NUM_PARTS)](
        x_MI, weight_OI, parts_ZMO, num_tokens, size_out, size_in, TILE_O=_TILE_O, NUM_PARTS=_NUM_PARTS,
        **_options(x_MI, size_in // _NUM_PARTS, _TILE_O),
    )  # fmt: skip
    return parts_ZMO


# The best of those tried on an H100, for 64 rows of 2048 channels: output channels of a tile with split inputs and
# without, input channels per iteration, splits of the input, and pipeline stages of the loads.
_TILE_O, _WIDE_TILE_O, _TILE_I, _NUM_PARTS, _STAGES = 32, 64, 128, 2, 5
# Bytes of each weight row prefetched into the L2 cache before the previous kernel has ended.
_BYTES_AHEAD = 512


def _fits(x_MI: torch.Tensor, size_out: int, tile: int, num_parts: int = 1) -> bool:
    """Whether there are few rows, and the weight consists of whole tiles, over all parts no more than SMs."""
    num_tokens, size_in = x_MI.shape
    is_whole = size_out % tile == 0 and size_in % (num_parts * _TILE_I) == 0
    is_few = num_tokens <= 64 and num_parts * size_out // tile <= num_multiprocessors(x_MI.device)
    return is_whole and is_few and x_MI.dtype.itemsize == 2


def _options(x_MI: torch.Tensor, size_in: int, num_channels: int) -> dict[str, int | bool]:
    """Options common to both kernels; a tile reads `size_in` inputs of each of `num_channels` output channels."""
    block_m = max(16, triton.next_power_of_2(x_MI.size(0)))
    piece_bytes = (block_m + num_channels) * _TILE_I * x_MI.itemsize
    return {
        "BLOCK_M": block_m,
        "TILE_I": _TILE_I,
        "STAGES": max(1, min(_STAGES, shared_memory(x_MI.device) // piece_bytes)),
        "BYTES_AHEAD": min(_BYTES_AHEAD, size_in * x_MI.itemsize),
        "num_warps": 4,
        **early_launch(x_MI.device),
    }


@triton.jit
def _product_kernel(
    x, weight, parts, num_tokens, size_out, size_in, BLOCK_M: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
    NUM_PARTS: tl.constexpr, STAGES: tl.constexpr, BYTES_AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    part = tl.program_id(1)
    m, o = tl.arange(0, BLOCK_M), tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    inside = (m < num_tokens)[:, None]
    per_part = size_in // NUM_PARTS
    fetch_into_cache(weight + o * size_in + part * per_part, BYTES_AHEAD, EARLY)
    wait_for_previous(EARLY)
    summed = tl.zeros([BLOCK_M, TILE_O], tl.float32)
    for start in tl.range(0, per_part, TILE_I, num_stages=STAGES):
        i = part * per_part + start + tl.arange(0, TILE_I)
        x_tile = tl.load(x + m[:, None] * size_in + i[None, :], mask=inside, other=0.0)
        weight_tile = tl.load(weight + o[:, None] * size_in + i[None, :])
        summed = tl.dot(x_tile, tl.trans(weight_tile), summed)
    tl.store(parts + (part * num_tokens + m[:, None]) * size_out + o[None, :], summed, mask=inside)


def biased_product(x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x_MI @ weight_OI.T + bias_O, [M, O]."""
    if not _fits(x_MI, weight_OI.size(0), _WIDE_TILE_O):
        return F.linear(x_MI, weight_OI, bias_O)
    return _wide_product(x_MI, weight_OI, bias_O, "none", is_gated=False)


def activated_product(
    x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """As `torch_ops.activated_product`; one kernel for a few rows."""
    fits = _fits(x_MI, weight_OI.size(0) // (1 + activation.is_gated), _WIDE_TILE_O)
    if activation.name is None or not fits:
        return activate(F.linear(x_MI, weight_OI, bias_O), activation)
    return _wide_product(x_MI, weight_OI, bias_O, activation.name, activation.is_gated)


def _wide_product(x_MI, weight_OI, bias_O, name: str, is_gated: bool) -> torch.Tensor:
    (num_tokens, size_in), size = x_MI.shape, weight_OI.size(0) // (1 + is_gated)
    activated_MF = x_MI.new_empty(num_tokens, size)
    _wide_product_kernel[(size // _WIDE_TILE_O,)](
        x_MI, weight_OI, bias_O, activated_MF, num_tokens, size, size_in, TILE_F=_WIDE_TILE_O, NAME=name,
        IS_GATED=is_gated, HAS_BIAS=bias_O is not None, **_options(x_MI, size_in, (1 + is_gated) * _WIDE_TILE_O),
    )  # fmt: skip
    return activated_MF


@triton.jit
def _wide_product_kernel(
    x, weight, bias, activated, num_tokens, size, size_in, BLOCK_M: tl.constexpr, TILE_F: tl.constexpr,
    TILE_I: tl.constexpr, STAGES: tl.constexpr, NAME: tl.constexpr, IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BYTES_AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    m, f = tl.arange(0, BLOCK_M), tl.program_id(0) * TILE_F + tl.arange(0, TILE_F)
    inside = (m < num_tokens)[:, None]
    element: tl.constexpr = activated.dtype.element_ty
    fetch_into_cache(weight + f * size_in, BYTES_AHEAD, EARLY)
    if IS_GATED:
        fetch_into_cache(weight + (size + f) * size_in, BYTES_AHEAD, EARLY)
    wait_for_previous(EARLY)
    gate, up = tl.zeros([BLOCK_M, TILE_F], tl.float32), tl.zeros([BLOCK_M, TILE_F], tl.float32)
    for start in tl.range(0, size_in, TILE_I, num_stages=STAGES):
        i = start + tl.arange(0, TILE_I)
        x_tile = tl.load(x + m[:, None] * size_in + i[None, :], mask=inside, other=0.0)
        gate_tile = tl.load(weight + f[:, None] * size_in + i[None, :])
        gate = tl.dot(x_tile, tl.trans(gate_tile), gate)
        if IS_GATED:
            up_tile = tl.load(weight + (size + f)[:, None] * size_in + i[None, :])
            up = tl.dot(x_tile, tl.trans(up_tile), up)
    if HAS_BIAS:
        gate += tl.load(bias + f).to(tl.float32)[None, :]
        if IS_GATED:
            up += tl.load(bias + size + f).to(tl.float32)[None, :]
    # rounded as a separate GEMM's output would be
    y = gate.to(element).to(tl.float32)
    if NAME != "none":
        y = _activation(y, NAME)
    if IS_GATED:
        y *= up.to(element).to(tl.float32)
    tl.store(activated + m[:, None] * size + f[None, :], y.to(element), mask=inside)
