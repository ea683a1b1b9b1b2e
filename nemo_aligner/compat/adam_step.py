"""Checkpoints of torch's Adam and AdamW, whose state holds the scalar `step` in addition to the moments.

megatron-core 0.9 shards every tensor of the optimizer's state like the parameter it belongs to, which fails for the
scalar. Apex keeps the step count in the parameter group; so do these checkpoints. Removal: with a megatron-core whose
`optim_state_to_sharding_state` leaves `step` alone.
"""

import torch


def apply() -> None:
    from nemo.collections.nlp.parts import nlp_overrides

    shard_state = nlp_overrides.optim_state_to_sharding_state
    if shard_state.__module__ == __name__:
        return

    def optim_state_to_sharding_state(optim_state_dict, id_to_sharded_param_map, exclude_keys=()):
        # copied, as torch returns the optimizer's own dicts
        states_of = {param_id: dict(state) for param_id, state in optim_state_dict["state"].items()}
        optim_state_dict["state"] = states_of
        for group in optim_state_dict["param_groups"]:
            states = [states_of.get(param_id, {}) for param_id in group["params"]]
            steps = {float(state.pop("step")) for state in states if "step" in state}
            if len(steps) > 1:
                raise ValueError(f"parameters of one group have taken different numbers of optimizer steps: {steps}")
            if steps:
                group["step"] = steps.pop()
        shard_state(optim_state_dict, id_to_sharded_param_map, exclude_keys)

    nlp_overrides.optim_state_to_sharding_state = optim_state_to_sharding_state
    init_states = nlp_overrides.init_optimizer_states

    def init_optimizer_states(optimizer):
        """NeMo creates the moments before the first step; Adam then expects `step` to exist as well."""
        init_states(optimizer)
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for state in optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))

    nlp_overrides.init_optimizer_states = init_optimizer_states


def restore_on_load(optimizer: torch.optim.Optimizer) -> None:
    """Make `load_state_dict` of the optimizer, or of the one that NeMo wraps, read `step` from the parameter groups."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        optimizer.register_load_state_dict_pre_hook(_move_steps_to_state)


def _move_steps_to_state(optimizer, state_dict: dict) -> None:
    for group in state_dict["param_groups"]:
        step = group.pop("step", None)
        for param_id in group["params"] if step is not None else []:
            state_dict["state"][param_id]["step"] = torch.tensor(step, dtype=torch.float32)
