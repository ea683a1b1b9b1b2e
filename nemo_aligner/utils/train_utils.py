"""The parts of a training step around Megatron's forward-backward schedule.

Every function takes the Lightning model first. Which collective runs depends on the optimizer: Apex's
`distributed_fused_adam` and megatron-core's `mcore_distributed_optim` reduce gradients themselves, a plain optimizer
(inside NeMo's `MainParamsOptimizerWrapper` with `megatron_amp_O2`) leaves that to this module.
"""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from nemo.core.optim.optimizer_with_main_params import MainParamsOptimizerWrapper
from nemo.utils.model_utils import param_is_not_shared


def set_sync_funcs(ptl_model, forward_only: bool) -> None:
    """Set the hooks with which the pipeline schedule delays, starts and finishes the optimizer's communication.

    Gradients are reduced during or after the last micro-batch, never earlier, because replicas may have different
    numbers of micro-batches.
    """
    no_sync_func = grad_sync_func = param_sync_func = None
    if ptl_model.with_distributed_adam and not forward_only:
        if ptl_model.use_mcore_dist_optim:
            no_sync_func, grad_sync_func, param_sync_func = _mcore_sync_funcs(ptl_model)
        else:
            no_sync_func = partial(ptl_model._optimizer.no_sync, greedy_grad_copy=ptl_model.megatron_amp_O2)
            grad_sync_func = ptl_model.reduce_overlap_gradients
            param_sync_func = ptl_model.sync_overlap_parameters
    elif not forward_only and _reduces_in_backward(ptl_model):
        no_sync_func = ptl_model._optimizer.no_sync
    for module in ptl_model.get_model_module_list():
        module.config.no_sync_func = no_sync_func
        module.config.grad_sync_func = grad_sync_func
        module.config.param_sync_func = param_sync_func
        if ptl_model.use_mcore_dist_optim:
            module.config.finalize_model_grads_func = _finish_grad_sync if ptl_model.use_peft else finalize_model_grads


def _finish_grad_sync(chunks, num_tokens=None) -> None:
    """`finalize_model_grads` for adapters, without the all-reduce of tied embeddings' gradients, which are frozen."""
    for chunk in chunks:
        chunk.finish_grad_sync()


def _reduces_in_backward(ptl_model) -> bool:
    """Whether NeMo's `MainParamsOptimizerWrapper` reduces each gradient as soon as the backward pass produces it."""
    optimizer = ptl_model._optimizer
    return isinstance(optimizer, MainParamsOptimizerWrapper) and optimizer.async_master_grads_allreudce  # NeMo's name


def _mcore_sync_funcs(ptl_model):
    optim_cfg = ptl_model.cfg.optim
    no_sync_func = grad_sync_func = param_sync_func = None
    if optim_cfg.get("overlap_grad_sync", False):
        no_sync_func = [chunk.no_sync for chunk in ptl_model.model]
        if optim_cfg.get("align_grad_reduce", True):
            grad_sync_func = [chunk.start_grad_sync for chunk in ptl_model.model]
    ddp_config = ptl_model.model[0].ddp_config
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        param_sync_func = [chunk.start_param_sync for chunk in ptl_model.model]
    if len(ptl_model.model) == 1:
        return tuple(f[0] if f else None for f in (no_sync_func, grad_sync_func, param_sync_func))
    return no_sync_func, grad_sync_func, param_sync_func


def prepare_for_training_step(ptl_model, zero_grad: bool = True) -> None:
    """Prepare the model and its gradient buffers for a forward-backward pass."""
    set_train(ptl_model)
    if ptl_model.initialize_ub:
        ptl_model.initialize_ub_func()
    if zero_grad:
        ptl_model._optimizer.zero_grad()
    if ptl_model.use_mcore_dist_optim:
        for chunk in ptl_model.model:
            chunk.zero_grad_buffer()
    elif ptl_model.with_distributed_adam:
        _wait_for_embedding_parameters(ptl_model)


def _wait_for_embedding_parameters(ptl_model) -> None:
    """Access the embedding weights in Python, which makes Apex gather them; torch passes them to C++ without that."""
    for module in ptl_model.get_model_module_list():
        if hasattr(module, "embedding"):
            for parameter in module.embedding.parameters():
                parameter.data_ptr()


def grad_reductions(ptl_model) -> None:
    """Finish reducing the gradients left by the schedule, so that each is reduced exactly once."""
    cfg = ptl_model.cfg
    if ptl_model.use_mcore_dist_optim:
        return  # the schedule called finalize_model_grads, which reduces everything
    if cfg.get("tensor_model_parallel_size", 1) > 1 and cfg.get("sequence_parallel", False):
        ptl_model.allreduce_sequence_parallel_gradients()
    if ptl_model.with_distributed_adam:
        ptl_model._optimizer._finish_bucket_grad_sync()
    elif parallel_state.get_data_parallel_world_size() > 1:
        if not ptl_model.megatron_amp_O2:
            ptl_model.allreduce_gradients()
        elif not _reduces_in_backward(ptl_model):
            ptl_model._optimizer.allreduce_main_grads()
    if cfg.get("pipeline_model_parallel_size", 1) > 1 and cfg.get("share_embeddings_and_output_weights", True):
        ptl_model.allreduce_first_last_embeddings()


def finish_param_sync(ptl_model) -> None:
    """Finish the parameter all-gather over DP ranks, which otherwise happens in the next forward pass."""
    if ptl_model.use_mcore_dist_optim:
        for chunk in ptl_model.model:
            for bucket_group in chunk.bucket_groups if chunk.ddp_config.overlap_param_gather else ():
                bucket_group.finish_param_sync(skip_next_bucket_dispatch=True)
    elif ptl_model.with_distributed_adam:
        for parameter in ptl_model._optimizer.parameters():
            # Apex's own copy accesses the parameter; the hook would then restart the copy recursively and fail.
            parameter._pre_forward_hook_is_enabled = False
        ptl_model._optimizer.param_sync()


@torch.no_grad()
def clip_gradients(ptl_model, clip_val: float | None) -> float | None:
    """Scale the gradients so that their 2-norm over all model-parallel shards is at most `clip_val`.

    Returns:
        The norm before clipping, or None if `clip_val` is None or not positive.
    """
    if clip_val is None or clip_val <= 0:
        return None
    if ptl_model.with_distributed_adam:
        if ptl_model.use_mcore_dist_optim:
            return _clip_mcore_gradients(ptl_model, clip_val)
        from nemo.collections.nlp.modules.common.megatron.clip_grads import clip_grad_norm_distributed_optimizer

        return float(clip_grad_norm_distributed_optimizer(ptl_model._optimizer, clip_val))
    if ptl_model.megatron_amp_O2:
        parameters = ptl_model._optimizer.get_parameters_with_grad()
    else:
        parameters = ptl_model.get_parameters_with_grad()
    counted_here = [p.grad for p in parameters if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p)]
    norm = _norm_over_ranks(counted_here, parallel_state.get_model_parallel_group())
    torch.nn.utils.clip_grads_with_norm_(parameters, clip_val, norm)
    return norm.item()


def _clip_mcore_gradients(ptl_model, clip_val: float) -> float:
    """The norm is over each data-parallel rank's shard of the reduced gradients; the whole buffers are scaled."""
    optimizer = ptl_model._optimizer.mcore_optimizer
    optimizer.prepare_grads()
    everybody = torch.distributed.group.WORLD
    norm = _norm_over_ranks(optimizer.get_main_grads_for_grad_norm(), everybody).item()
    factor = clip_val / (norm + 1e-6)  # same epsilon as torch
    if factor < 1:
        for chunk in ptl_model.model:
            chunk.scale_gradients(factor)
    return norm


def _norm_over_ranks(gradients: list[torch.Tensor], group) -> torch.Tensor:
    """2-norm (fp32 scalar) over the ranks of `group`; each gradient must be passed on exactly one rank."""
    squared = torch.nn.utils.get_total_norm(gradients).float().square().to(torch.cuda.current_device())
    torch.distributed.all_reduce(squared, group=group)
    return squared.sqrt()


def set_train(ptl_model) -> None:
    for module in (ptl_model, *_chunks(ptl_model)):
        module.train()


def set_eval(ptl_model) -> None:
    for module in (ptl_model, *_chunks(ptl_model)):
        module.eval()


def prepare_for_validation_step(ptl_model) -> None:
    if ptl_model.initialize_ub:
        ptl_model.initialize_ub_func()
    set_eval(ptl_model)


def finish_validation_step(ptl_model) -> None:
    set_train(ptl_model)


def _chunks(ptl_model) -> list[torch.nn.Module]:
    return ptl_model.model if isinstance(ptl_model.model, list) else [ptl_model.model]
