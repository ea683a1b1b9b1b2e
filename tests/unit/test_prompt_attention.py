"""Attention of packed prompts compared with its formula, head by head in float64.

Legend: U tokens of prompts, M the same with padding, G key/value groups, Q query heads per group, D channels per head.
"""

from types import SimpleNamespace

import pytest
import torch

from nemo_aligner.generation.attention import PrefillAttention, RotaryTable
from nemo_aligner.generation.kv_cache import KVCache

LENGTHS, CAPACITY = [5, 0, 17, 1], 32


def turned(x_D, position: int, angles_TD):
    """Rotate channels i and i + A/2 as complex numbers by the rotary angle; channels from A on are unchanged."""
    if angles_TD is None:
        return x_D
    half = angles_TD.size(1) // 2
    number = torch.complex(x_D[:half], x_D[half : 2 * half])
    number = number * torch.polar(torch.ones(half, dtype=torch.float64), angles_TD[position, :half])
    return torch.cat([number.real, number.imag, x_D[2 * half :]])


@pytest.mark.parametrize("num_padding", [0, 9])
@pytest.mark.parametrize(("G", "Q", "D", "num_turned"), [(2, 1, 16, 16), (3, 3, 8, 8), (2, 2, 80, 32), (1, 4, 8, 0)])
def test_prompts_attend_to_themselves_and_are_cached_and_padding_is_not(num_padding, G, Q, D, num_turned):
    generator = torch.Generator().manual_seed(0)
    angles_TD = None
    if num_turned:
        angles_TD = (torch.rand(CAPACITY, num_turned // 2, generator=generator) * 6).double().repeat(1, 2)
    weights = SimpleNamespace(
        num_groups=G, heads_per_group=Q, head_dim=D, dtype=torch.float32, device=torch.device("cpu"),
        rotary=None if angles_TD is None else lambda capacity: angles_TD[:capacity, None, None],
    )  # fmt: skip
    num_tokens = sum(LENGTHS)
    qkv_MX = torch.randn(num_tokens + num_padding, G * (Q + 2) * D, generator=generator)
    cache = KVCache(2, len(LENGTHS) + 1, G, CAPACITY, D, torch.float32, "cpu")
    cache.keys_LRGTD.fill_(torch.nan), cache.values_LRGTD.fill_(torch.nan)

    attend = PrefillAttention(weights, RotaryTable(weights, CAPACITY), cache, LENGTHS, num_padding)
    context_MX = attend(1, qkv_MX)

    expected_keys, expected_values = torch.full_like(cache.keys_LRGTD, torch.nan), cache.values_LRGTD.clone()
    expected_values.fill_(torch.nan)
    expected_MGQD = torch.zeros(len(qkv_MX), G, Q, D, dtype=torch.float64)
    heads_MGXD = qkv_MX.double().view(len(qkv_MX), G, Q + 2, D)
    start = 0
    for row, length in enumerate([*LENGTHS, num_padding]):
        is_padding = row == len(LENGTHS)
        positions = [0] * length if is_padding else list(range(length))
        assert attend.position_M[start : start + length].tolist() == positions
        for group in range(G):
            of_group = heads_MGXD[start : start + length, group]
            *queries, keys = (
                [turned(x_D, position, angles_TD) for x_D, position in zip(of_group[:, head], positions, strict=True)]
                for head in range(Q + 1)
            )
            for index in range(length):
                keys_tD, values_tD = torch.stack(keys[: index + 1]), of_group[: index + 1, -1]
                for head in range(Q):
                    weights_t = (keys_tD @ queries[head][index] / D**0.5).softmax(0)
                    expected_MGQD[start + index, group, head] = weights_t @ values_tD
            if length and not is_padding:
                expected_keys[1, row, group, :length] = torch.stack(keys)
                expected_values[1, row, group, :length] = of_group[:, -1]
        start += length
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(context_MX.double(), expected_MGQD.flatten(1), **close)
    torch.testing.assert_close(cache.keys_LRGTD, expected_keys, equal_nan=True, **close)
    torch.testing.assert_close(cache.values_LRGTD, expected_values, equal_nan=True, rtol=0, atol=0)
