"""The optimizer's state survives the way to the host and back bit for bit, in whatever order the calls come."""

import contextlib

import pytest
import torch

from nemo_aligner.utils.optimizer_offload import OptimizerOffload

SIZES = (1, 1000, 4096, 3_000_001)


@pytest.fixture
def state():
    """Tensors of several sizes and dtypes; two of them share memory."""
    generator = torch.Generator("cuda").manual_seed(1)
    tensors = [torch.randn(size, generator=generator, device="cuda") for size in SIZES]
    tensors.append(torch.randint(-(2**15), 2**15, (777,), dtype=torch.int16, device="cuda", generator=generator))
    return [*tensors, tensors[2][100:200]]


@pytest.fixture
def offload(state):
    return OptimizerOffload(lambda: state)


def memory_of(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def use_the_gpu() -> torch.Tensor:
    """Run something that takes a while and uses the freed memory."""
    matrix = torch.ones(4096, 4096, device="cuda")
    for _ in range(20):
        matrix = matrix @ matrix / 4096
    return matrix


def test_there_and_back(state, offload):
    expected, num_bytes = [tensor.clone() for tensor in state], memory_of(state[:-1])
    offload.pin_in_background()
    for _ in range(3):
        before = torch.cuda.memory_allocated()
        assert offload.offload() == num_bytes
        freed = before - torch.cuda.memory_allocated()
        assert num_bytes <= freed < num_bytes + 2**20 * len(state)  # the allocator may round up
        assert memory_of(state) == 0
        in_between = use_the_gpu()
        offload.start_onload()
        others = torch.full((1000, 1000), 7.0, device="cuda")
        offload.finish_onload()
        assert all(torch.equal(tensor, value) for tensor, value in zip(state, expected, strict=True))
        assert (in_between == 1).all() and (others == 7).all()
        state[1].mul_(1.5)
        expected[1].mul_(1.5)


def test_calls_in_any_order(state, offload):
    expected = [tensor.clone() for tensor in state]
    calls = {"o": offload.offload, "s": offload.start_onload, "f": offload.finish_onload}
    for order in ("oo", "ss", "f", "osos", "of", "sfsf", "oooss", "fo", "offss", "os", "o", "sf"):
        for call in order:
            calls[call]()
    assert all(torch.equal(tensor, value) for tensor, value in zip(state, expected, strict=True))


@pytest.mark.parametrize("next_call", ["offload", "start_onload"])
def test_an_exception_half_way_out_loses_nothing(state, offload, monkeypatch, next_call):
    expected, resize = [tensor.clone() for tensor in state], torch.UntypedStorage.resize_
    resized = []

    def fail_at_the_third(storage, size):
        resized.append(storage)
        if len(resized) == 3:
            raise KeyboardInterrupt
        return resize(storage, size)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        offload.offload()
    getattr(offload, next_call)()
    offload.start_onload()
    offload.finish_onload()
    assert all(torch.equal(tensor, value) for tensor, value in zip(state, expected, strict=True))


def test_without_room_on_the_gpu_everything_stays_on_the_host(state, offload, monkeypatch):
    expected, resize = [tensor.clone() for tensor in state], torch.UntypedStorage.resize_
    offload.offload()

    def refuse_the_largest(storage, size):
        if size > 10**6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return resize(storage, size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "resize_", refuse_the_largest)
        with pytest.raises(torch.OutOfMemoryError):
            offload.start_onload()
        assert memory_of(state) == 0
    offload.start_onload()
    offload.finish_onload()
    assert all(torch.equal(tensor, value) for tensor, value in zip(state, expected, strict=True))


def test_host_memory_is_kept_and_no_larger_than_the_state(state, offload):
    num_bytes = memory_of(state[:-1])
    offload.offload()
    pieces = list(offload._host.pieces)
    assert sum(piece.numel() for piece in pieces) <= num_bytes + 2**20
    assert all(piece.is_pinned() for piece in pieces)
    offload.start_onload()
    offload.offload()
    assert all(kept is piece for kept, piece in zip(offload._host.pieces, pieces, strict=True))


def test_a_state_that_has_grown_finds_room(state, offload):
    offload.offload()
    offload.start_onload()
    offload.finish_onload()
    state.append(torch.arange(5_000_000, device="cuda"))
    offload.offload()
    offload.start_onload()
    offload.finish_onload()
    assert torch.equal(state[-1], torch.arange(5_000_000, device="cuda"))


# ---- a state that stays on the host and passes through the GPU in groups


@pytest.fixture
def groups():
    """Twelve groups of tensors, 8 MiB each."""
    generator = torch.Generator("cuda").manual_seed(1)
    return {key: [torch.randn(2**20, generator=generator, device="cuda") for _ in range(2)] for key in range(12)}


def active_bytes() -> int:
    """Includes memory that has been released while copies still read from it."""
    return torch.cuda.memory_stats()["active_bytes.all.current"]


def tensors_of(groups) -> list[torch.Tensor]:
    return [tensor for group in groups.values() for tensor in group]


def test_groups_pass_through_and_keep_what_they_are_given(groups):
    offload = OptimizerOffload(lambda: tensors_of(groups))
    expected = {key: [tensor.clone() for tensor in group] for key, group in groups.items()}
    num_bytes = offload.offload()
    torch.cuda.synchronize()
    before, here = active_bytes(), []
    for _ in range(3):  # the last groups may still be on their way out when the next round begins
        order = sorted(groups, reverse=True)
        for key, wanted in zip(offload.passing_through({key: groups[key] for key in order}), order, strict=True):
            assert key == wanted
            use_the_gpu()  # exposes changes before a group has arrived and departures before it is changed
            for tensor, value in zip(groups[key], expected[key], strict=True):
                tensor.mul_(key + 2)
                value.mul_(key + 2)
            here.append(active_bytes() - before)
        assert offload.num_bytes_away == num_bytes and memory_of(tensors_of(groups)) == 0
    assert max(here) <= num_bytes / 2
    offload.start_onload()
    offload.finish_onload()
    assert all(torch.equal(*pair) for key in groups for pair in zip(groups[key], expected[key], strict=True))


def test_an_exception_while_groups_pass_loses_nothing(groups):
    offload = OptimizerOffload(lambda: tensors_of(groups))
    expected = [tensor.clone() for tensor in tensors_of(groups)]
    offload.offload()
    with pytest.raises(KeyboardInterrupt), contextlib.closing(offload.passing_through(groups)) as turns:
        for key in turns:
            groups[key][0].add_(1)
            if key == 4:
                raise KeyboardInterrupt
    assert memory_of(tensors_of(groups)) == 0
    offload.start_onload()
    offload.finish_onload()
    for key in range(5):
        expected[2 * key].add_(1)
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors_of(groups), expected, strict=True))
