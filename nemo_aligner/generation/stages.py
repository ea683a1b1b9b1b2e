"""One forward pass through a pipeline of stages, virtual ones included.

Megatron's interleaved schedule wants a multiple of PP micro-batches. Decoding has one, which visits each stage's first
chunk, then each stage's second, and so on.
"""

import contextlib
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import recv_forward, send_forward
from megatron.core.utils import get_attr_wrapped_model, get_model_config


def forward_through_stages(
    chunks: list[torch.nn.Module],
    forward: Callable[[int, torch.nn.Module], torch.Tensor],
    num_rows: int,
    num_positions: int,
) -> torch.Tensor | None:
    """Call `forward` on every chunk of the model in its order; all pipeline ranks of a replica call this together.

    Args:
        chunks: this rank's chunks of the model, one without virtual stages.
        forward: from a chunk, and its number on this rank, to its output. Chunks behind the model's first take hidden
            states [num_positions, num_rows, H], which are set here, instead of tokens.

    Returns:
        the last chunk's output on the last stage, None on the others.
    """
    config = get_model_config(chunks[0])
    shape = (num_positions, num_rows, config.hidden_size)
    autocast = contextlib.nullcontext()
    if config.enable_autocast:
        autocast = torch.autocast("cuda", dtype=config.autocast_dtype)
    for number, chunk in enumerate(chunks):
        if len(chunks) > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(number)
        get_attr_wrapped_model(chunk, "set_input_tensor")(recv_forward(shape, config))
        with autocast:
            output = forward(number, chunk)
        if parallel_state.is_pipeline_last_stage():
            return output
        send_forward(output.to(config.pipeline_dtype), config)  # the dtype in which it is received
    return None
