"""The operations of a layer over a pack other than GEMMs and attention, forward and backward, without autograd.

On a GPU each is one kernel of `layer_kernels`, which reads and writes every matrix once; elsewhere, and for activations
without a kernel, torch's own functions are used.

The gradients of biases and norm parameters are column sums of matrices [T, C] that pass through here. The function that
processes such a matrix writes partial sums [Z, C] to the buffer provided by `ColumnSums`, which adds up all of a
layer's at once. The order of summation depends only on the GPU model.

Legend: T tokens, H hidden size, F width of the MLP, E = F, or 2 F if it is gated, Z partial sums, C columns.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from nemo_aligner.models.nlp.gpt.activation import Activation, activate
from nemo_aligner.utils.weight_gradients import stand_in_gradient


class ColumnSums:
    """The gradients of a layer's vectors (biases and norm parameters).

    `parts` has float32 [Z, C] for each, or None for a vector that is absent or not trained. All must be filled before
    `finish`.
    """

    def __init__(self, vectors: Sequence[torch.Tensor | None], grad_TH: torch.Tensor):
        """`grad_TH` has the device and dtype of the matrices to be summed."""
        self._vectors = [vector if vector is not None and vector.requires_grad else None for vector in vectors]
        self._widths = [0 if vector is None else vector.numel() for vector in self._vectors]
        # if dtypes differ, autograd rounds to each vector's
        trained = (vector.dtype for vector in self._vectors if vector is not None)
        self._dtype = functools.reduce(torch.promote_types, trained, grad_TH.dtype)
        self._parts_ZC = torch.empty(
            _num_parts(grad_TH.device),
            sum(self._widths),
            dtype=torch.promote_types(grad_TH.dtype, torch.float32),
            device=grad_TH.device,
        )
        self.parts = self._of_trained(self._parts_ZC.split(self._widths, dim=1))

    def finish(self, fuse: bool) -> list[torch.Tensor | None]:
        """The gradients to return from a backward pass; `fuse` as for `weight_gradient`."""
        trained = [vector for vector in self._vectors if vector is not None]
        # NeMo's half-precision optimizer has no gradient buffer for float32 parameters
        if not (fuse and all(hasattr(vector, "main_grad") for vector in trained)):
            return self._of_trained(self._added_up(self._dtype).split(self._widths))
        if trained:
            sums = self._of_trained(self._added_up(self._parts_ZC.dtype).split(self._widths))
            torch._foreach_add_([vector.main_grad for vector in trained], [x for x in sums if x is not None])
        return [vector if vector is None else stand_in_gradient(vector) for vector in self._vectors]

    def _added_up(self, dtype: torch.dtype) -> torch.Tensor:
        if not self._parts_ZC.is_cuda:
            return self._parts_ZC.sum(0).to(dtype)
        from nemo_aligner.models.nlp.gpt import layer_kernels

        return layer_kernels.add_up(self._parts_ZC, dtype)

    def _of_trained(self, of_vectors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return [None if vector is None else x for vector, x in zip(self._vectors, of_vectors, strict=True)]


@functools.cache
def _num_parts(device: torch.device) -> int:
    """One for each program that shares the tokens: as many of the norm's gradient kernel as a GPU has registers for.

    Calculated, not measured: registers of an H100 SM suffice for two programs of 256 threads with 116 registers each,
    for 2048 channels.
    """
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def put_column_sums_(part_ZC: torch.Tensor | None, x_TC: torch.Tensor) -> None:
    """Column sums of a matrix that no kernel processes, in the first part."""
    if part_ZC is not None:
        _put_(part_ZC, x_TC.sum(0, dtype=part_ZC.dtype))


def _put_(part_ZC: torch.Tensor | None, sums_C: torch.Tensor | None) -> None:
    if part_ZC is not None:
        part_ZC[0] = sums_C
        part_ZC[1:] = 0


def norm_and_residual(
    norm: torch.nn.Module, x_TH: torch.Tensor, bias_H: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of a residual branch, and the residual itself.

    Args:
        norm: a `layer_spec.Norm`.
        bias_H: bias of the branch's last linear layer.

    Returns:
        `norm(x_TH)`, and `x_TH + bias_H` in new memory, to which the GEMM of that layer can be added in place.
    """
    if x_TH.is_cuda:
        from nemo_aligner.models.nlp.gpt import layer_kernels

        return layer_kernels.norm_and_residual(norm, x_TH, bias_H)
    return norm.normalize(x_TH, norm.weight, norm.bias), x_TH.clone() if bias_H is None else x_TH + bias_H


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
    """Backward of `norm(x_TH)` and the residual connection around it.

    Args:
        grad_TH: the gradient of the norm's output. May be overwritten.
        residual_grad_TH: the gradient of `x_TH` from the residual connection.
        of_scale_ZH, of_shift_ZH: outputs, column sums for the norm's parameters.
        of_residual_ZH: output, column sums of `residual_grad_TH`.
        of_input_ZH: output, column sums of the returned gradient.

    Returns:
        The recomputed output of the norm, and the gradient of `x_TH`.
    """
    if x_TH.is_cuda:
        from nemo_aligner.models.nlp.gpt import layer_kernels

        return layer_kernels.norm_gradient(
            norm, x_TH, grad_TH, residual_grad_TH, of_scale_ZH, of_shift_ZH, of_residual_ZH, of_input_ZH
        )
    normed_TH, (grad_x_TH, scale_grad_H, shift_grad_H) = _with_gradients(
        norm.normalize, grad_TH, x_TH, norm.weight, norm.bias
    )
    grad_x_TH += residual_grad_TH
    _put_(of_scale_ZH, scale_grad_H)
    _put_(of_shift_ZH, shift_grad_H)
    put_column_sums_(of_residual_ZH, residual_grad_TH)
    put_column_sums_(of_input_ZH, grad_x_TH)
    return normed_TH, grad_x_TH


def activation_gradient(
    inner_TE: torch.Tensor, grad_TF: torch.Tensor, activation: Activation, of_inner_ZE: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of `activate(inner_TE, activation)`.

    Args:
        grad_TF: the gradient of its output. May be overwritten.
        of_inner_ZE: output, column sums of the gradient of `inner_TE`.

    Returns:
        The recomputed activated values [T, F], and the gradient of `inner_TE`.
    """
    if inner_TE.is_cuda and activation.name is not None:
        from nemo_aligner.models.nlp.gpt import layer_kernels

        return layer_kernels.activation_gradient(inner_TE, grad_TF, activation, of_inner_ZE)
    activated_TF, (grad_TE,) = _with_gradients(functools.partial(activate, activation=activation), grad_TF, inner_TE)
    put_column_sums_(of_inner_ZE, grad_TE)
    return activated_TF, grad_TE


def _with_gradients(
    function: Callable[..., torch.Tensor], grad: torch.Tensor, *inputs: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """`function(*inputs)`, and the inputs' gradients, given the gradient `grad` of the result."""
    with torch.enable_grad():
        inputs = [x if x is None else x.detach().requires_grad_() for x in inputs]
        y = function(*inputs)
    found = iter(torch.autograd.grad(y, [x for x in inputs if x is not None], grad))
    return y.detach(), [x if x is None else next(found) for x in inputs]
