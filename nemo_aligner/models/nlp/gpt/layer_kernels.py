"""`layer_ops` as Triton kernels: one launch each, every matrix is read and written once.

Each program accumulates its tokens' share of sums over tokens in float32, and stores it once.

Legend: T tokens, H hidden size, F width of the MLP, E = F, or 2 F if it is gated, Z partial sums, C columns.
"""

import torch
import triton
import triton.language as tl

from nemo_aligner.models.nlp.gpt.activation import Activation

# ---- norms


def norm_and_residual(
    norm: torch.nn.Module, x_TH: torch.Tensor, bias_H: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, size = x_TH.shape
    normed_TH, residual_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    _norm_and_residual_kernel[(num_tokens,)](
        x_TH, bias_H, norm.weight, norm.bias, normed_TH, residual_TH, size, norm.eps, **_norm_options(norm, size)
    )
    return normed_TH, residual_TH


def norm_gradient(
    norm: torch.nn.Module,
    x_TH: torch.Tensor,
    grad_TH: torch.Tensor,
    residual_grad_TH: torch.Tensor,
    of_scale_ZH: torch.Tensor | None,
    of_shift_ZH: torch.Tensor | None,
    of_residual_ZH: torch.Tensor | None = None,
    of_input_ZH: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `x_TH` overwrites `grad_TH`."""
    num_tokens, size = x_TH.shape
    parts = of_scale_ZH, of_shift_ZH, of_residual_ZH, of_input_ZH
    num_programs, stride = _programs(num_tokens, *parts)
    normed_TH = torch.empty_like(x_TH)
    _norm_gradient_kernel[(num_programs,)](
        x_TH, grad_TH, residual_grad_TH, norm.weight, norm.bias, normed_TH, *parts, num_tokens, size, stride,
        norm.eps, STAGES=2, **_norm_options(norm, size),
    )  # fmt: skip
    return normed_TH, grad_TH


def _norm_options(norm: torch.nn.Module, size: int) -> dict[str, int | bool]:
    block = triton.next_power_of_2(size)
    return {
        "IS_RMS": norm.is_rms,
        "ZERO_CENTERED": norm.zero_centered,
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 256)),
    }


def _programs(num_tokens: int, *parts_ZC: torch.Tensor | None) -> tuple[int, int]:
    """Number of programs that share the tokens, and the stride between their partial sums."""
    for part_ZC in parts_ZC:
        if part_ZC is not None:
            return part_ZC.size(0), part_ZC.stride(0)
    return num_tokens, 0


@triton.jit
def _unit(x, inside, size, eps, IS_RMS: tl.constexpr):
    """A normalized row before scale and shift, and the factor it was multiplied by."""
    if not IS_RMS:
        x = tl.where(inside, x - tl.sum(x, axis=0) / size, 0.0)
    factor = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    return x * factor, factor


@triton.jit
def _scale_and_shift(weight, bias, column, inside, ZERO_CENTERED: tl.constexpr):
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        scale += 1.0
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def _norm_and_residual_kernel(
    x, x_bias, weight, bias, normed, residual, size, eps,
    IS_RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < size
    at = tl.program_id(0).to(tl.int64) * size + column
    scale, shift = _scale_and_shift(weight, bias, column, inside, ZERO_CENTERED)
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    along = row
    if x_bias is not None:
        along += tl.load(x_bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + at, along.to(residual.dtype.element_ty), mask=inside)
    unit, _ = _unit(row, inside, size, eps, IS_RMS)
    tl.store(normed + at, (unit * scale + shift).to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _norm_gradient_kernel(
    x, grad, residual_grad, weight, bias, normed, of_scale, of_shift, of_residual, of_input, num_tokens, size, stride,
    eps, STAGES: tl.constexpr, IS_RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < size
    scale, shift = _scale_and_shift(weight, bias, column, inside, ZERO_CENTERED)
    scale_sum, shift_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    residual_sum, input_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)

    for token in tl.range(tl.program_id(0), num_tokens, tl.num_programs(0), num_stages=STAGES):
        at = tl.cast(token, tl.int64) * size + column
        row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        of_output = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        beside = tl.load(residual_grad + at, mask=inside, other=0.0).to(tl.float32)
        unit, factor = _unit(row, inside, size, eps, IS_RMS)
        tl.store(normed + at, (unit * scale + shift).to(normed.dtype.element_ty), mask=inside)
        # a norm is invariant to scaling a row and, except RMSNorm, to shifting it: project out these directions
        of_unit = of_output * scale
        of_row = of_unit - unit * (tl.sum(of_unit * unit, axis=0) / size)
        if not IS_RMS:
            of_row -= tl.sum(of_unit, axis=0) / size
        of_row = tl.where(inside, of_row * factor + beside, 0.0)
        tl.store(grad + at, of_row.to(grad.dtype.element_ty), mask=inside)
        scale_sum += of_output * unit
        shift_sum += of_output
        residual_sum += beside
        input_sum += of_row

    at = tl.program_id(0) * stride + column
    if of_scale is not None:
        tl.store(of_scale + at, scale_sum, mask=inside)
    if of_shift is not None:
        tl.store(of_shift + at, shift_sum, mask=inside)
    if of_residual is not None:
        tl.store(of_residual + at, residual_sum, mask=inside)
    if of_input is not None:
        tl.store(of_input + at, input_sum, mask=inside)


# ---- the MLP's activation


def activation_gradient(
    inner_TE: torch.Tensor, grad_TF: torch.Tensor, activation: Activation, of_inner_ZE: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`grad_TF` is overwritten by the gradient of `inner_TE`, or, if that is wider, by the activated values."""
    num_tokens, size = grad_TF.shape
    num_programs, stride = _programs(num_tokens, of_inner_ZE)
    grad_TE, activated_TF = grad_TF, grad_TF
    if activation.is_gated:
        grad_TE = torch.empty_like(inner_TE)
    else:
        activated_TF = torch.empty_like(grad_TF)
    block = min(1024, triton.next_power_of_2(size))
    _activation_gradient_kernel[(num_programs, triton.cdiv(size, block))](
        inner_TE, grad_TF, activated_TF, grad_TE, of_inner_ZE, num_tokens, size, stride,
        NAME=activation.name, IS_GATED=activation.is_gated, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return activated_TF, grad_TE


@triton.jit
def _value_and_slope(x, NAME: tl.constexpr):
    """Activation and derivative. All three are x times a factor in (0, 1); 0.5 (1 + tanh(a)) = sigmoid(2 a)."""
    if NAME == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "silu":
        share = tl.sigmoid(x)
        slope = share + x * share * (1.0 - share)
    else:
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * share, slope


@triton.jit(do_not_specialize=["num_tokens"])
def _activation_gradient_kernel(
    inner, grad, activated, of_inner, sums, num_tokens, size, stride,
    NAME: tl.constexpr, IS_GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    width = size * (2 if IS_GATED else 1)
    element: tl.constexpr = inner.dtype.element_ty
    gate_sum, up_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)

    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        row = tl.cast(token, tl.int64)
        at_gate, at = row * width + column, row * size + column
        of_output = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        value, slope = _value_and_slope(tl.load(inner + at_gate, mask=inside, other=0.0).to(tl.float32), NAME)
        if IS_GATED:
            of_up = of_output * value
            tl.store(of_inner + at_gate + size, of_up.to(element), mask=inside)
            up_sum += of_up
            up = tl.load(inner + at_gate + size, mask=inside, other=0.0).to(tl.float32)
            value *= up
            slope *= up
        of_gate = of_output * slope
        gate_sum += of_gate
        tl.store(of_inner + at_gate, of_gate.to(element), mask=inside)
        tl.store(activated + at, value.to(element), mask=inside)

    if sums is not None:
        out = sums + tl.program_id(0) * stride + column
        tl.store(out, gate_sum, mask=inside)
        if IS_GATED:
            tl.store(out + size, up_sum, mask=inside)


# ---- sums


def add_up(parts_ZC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over the parts, [C]."""
    num_parts, size = parts_ZC.shape
    sums_C = parts_ZC.new_empty(size, dtype=dtype)
    _add_up_kernel[(triton.cdiv(size, 64),)](parts_ZC, sums_C, num_parts, size, BLOCK_Z=64, BLOCK_C=64)
    return sums_C


@triton.jit
def _add_up_kernel(parts, sums, num_parts, size, BLOCK_Z: tl.constexpr, BLOCK_C: tl.constexpr):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_Z, BLOCK_C], tl.float32)
    for first in range(0, num_parts, BLOCK_Z):
        z = first + tl.arange(0, BLOCK_Z)[:, None]
        total += tl.load(parts + z * size + column, mask=(z < num_parts) & (column < size), other=0.0)
    tl.store(sums + column, tl.sum(total, axis=0).to(sums.dtype.element_ty), mask=column < size)
