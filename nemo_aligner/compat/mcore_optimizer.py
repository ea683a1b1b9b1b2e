"""megatron-core 0.9's distributed optimizer under NeMo 2.0.0, with a custom training loop and without Apex.

Removal: with a NeMo whose wrapper can be stepped without a closure and saves in a format that other parallel layouts
can read, and a megatron-core that accepts torch's Adam.
"""

import functools

import torch


def apply() -> None:
    from megatron.core.optimizer import distrib_optimizer
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    if McoreDistributedOptimizer.step.__module__ == __name__:
        return
    McoreDistributedOptimizer.step = _step
    McoreDistributedOptimizer.sharded_state_dict = _sharded_state_dict
    _match_groups(distrib_optimizer.DistributedOptimizer)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _allow_torch_adam(distrib_optimizer)


def _step(self, closure=None):
    """NeMo's version requires the closure that Lightning's loop would pass."""
    loss = None if closure is None else closure()
    _, grad_norm, num_zeros_in_grad = self.mcore_optimizer.step()
    return loss, grad_norm, num_zeros_in_grad


def _sharded_state_dict(self, model_sharded_state_dict, optimizer_state_dict=None, is_loading=False, **_):
    """NeMo's default ties a checkpoint to the tensor and pipeline parallel sizes that it was written with."""
    return self.mcore_optimizer.sharded_state_dict(
        model_sharded_state_dict, is_loading=is_loading, sharding_type="fully_sharded_model_space"
    )


def _match_groups(cls) -> None:
    """Match parameter groups by weight decay. Their order depends on a stage's parameters, but they load by index.

    The groups of the first stage, where matrices come first, would then apply their weight decay to another's norms.
    """
    load_state_dict = cls.load_state_dict

    @functools.wraps(load_state_dict)
    def load_matching_groups(self, state_dict):
        saved = {group["wd_mult"]: group for group in state_dict["optimizer"]["param_groups"]}
        groups = [saved[group["wd_mult"]] for group in self.optimizer.param_groups]
        load_state_dict(self, {**state_dict, "optimizer": {**state_dict["optimizer"], "param_groups": groups}})

    cls.load_state_dict = load_matching_groups


def _allow_torch_adam(distrib_optimizer) -> None:
    """The class supports torch's Adam, but an assertion in its constructor rejects it."""
    construct = distrib_optimizer.DistributedOptimizer.__init__

    @functools.wraps(construct)
    def construct_without_apex(self, *args, **kwargs):
        distrib_optimizer.HAVE_APEX_OR_TE = True
        try:
            construct(self, *args, **kwargs)
        finally:
            distrib_optimizer.HAVE_APEX_OR_TE = False

    distrib_optimizer.DistributedOptimizer.__init__ = construct_without_apex
    for name in ("sharded_param_state_fs_model_space", "load_parameter_state_from_fs_model_space"):
        _hide_steps_from(distrib_optimizer.DistributedOptimizer, name)
    _give_each_parameter_its_own_step(distrib_optimizer.DistributedOptimizer)


def _hide_steps_from(cls, name: str) -> None:
    """torch stores the step per parameter; the class keeps it in its groups and would also treat it as a shard."""
    method = getattr(cls, name)

    @functools.wraps(method)
    def without_steps(self, *args, **kwargs):
        states = self.optimizer.state.values()
        steps = [state.pop("step") for state in states]
        try:
            return method(self, *args, **kwargs)
        finally:
            for state, step in zip(states, steps, strict=True):
                state["step"] = step

    setattr(cls, name, without_steps)


def _give_each_parameter_its_own_step(cls) -> None:
    """Restoring shares one `step` tensor among all parameters, and torch increments it in place for each of them."""
    load_state_dict = cls.load_state_dict

    @functools.wraps(load_state_dict)
    def load_and_separate(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    cls.load_state_dict = load_and_separate


def complete(optimizer) -> None:
    """Set up on a new `McoreDistributedOptimizer` what Megatron's own training loop would set up later.

    Megatron's scheduler, which NeMo does not use, exempts biases and norms from weight decay. The moments would be
    created in the first step; but a checkpoint may be written before, and the offload needs the state's size up front.
    """
    inner = optimizer.mcore_optimizer.optimizer
    for group in inner.param_groups:
        group["weight_decay"] *= group["wd_mult"]
        for parameter in group["params"]:
            state = inner.state[parameter]
            state.setdefault("exp_avg", torch.zeros_like(parameter.data))
            state.setdefault("exp_avg_sq", torch.zeros_like(parameter.data))
            if isinstance(inner, torch.optim.Adam):  # torch counts steps per parameter, Apex per group
                state.setdefault("step", torch.tensor(0.0))
