"""The reward head on hidden states small enough to score by hand, in one process."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_aligner.models.nlp.gpt.gpt_reward_model import GPTRewardModel, RewardModelHead
from nemo_aligner.utils.errors import ConfigError

# hidden_SBH: 3 positions of 2 rows of 2 numbers; the second row has length 2, so its last position is padding.
HIDDEN = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 1.0], [4.0, 3.0]], [[3.0, 5.0], [100.0, 100.0]]])
LENGTHS = torch.tensor([3, 2])


@pytest.fixture(scope="module", autouse=True)
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def config(**changes):
    return TransformerConfig(num_layers=1, hidden_size=2, num_attention_heads=1, use_cpu_initialization=True, **changes)


def head(weight=((2.0, -1.0),), bias=(0.5,), **options):
    """The default attribute is 2 h0 - h1 + 0.5."""
    made = RewardModelHead(config(), num_attributes=len(weight), **options)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        made.bias.copy_(torch.tensor(bias))
    return made


TWO_ATTRIBUTES = {"weight": ((2.0, -1.0), (1.0, 1.0)), "bias": (0.5, 0.0)}


def test_the_last_token_of_each_row_is_scored():
    # 2*3 - 5 + 0.5; 2*4 - 3 + 0.5
    assert head()(HIDDEN, LENGTHS).tolist() == [[1.5], [5.5]]
    assert head()(HIDDEN, torch.tensor([1, 1])).tolist() == [[2.5], [-0.5]]


def test_average_pooling_leaves_padding_out():
    # means (2, 2) and (2, 2): 2*2 - 2 + 0.5
    assert head(use_avg_pool=True)(HIDDEN, LENGTHS).tolist() == [[2.5], [2.5]]


def test_a_row_that_only_fills_a_batch_up_is_harmless():
    poisoned = HIDDEN.clone()
    poisoned[:, 1] = float("nan")
    assert head(use_avg_pool=True)(poisoned, torch.tensor([3, 0])).tolist() == [[2.5], [0.5]]
    assert head()(poisoned, torch.tensor([3, 0]))[0].tolist() == [1.5]


def test_every_position_is_scored():
    scored = head(output_sequence=True)(HIDDEN, LENGTHS)
    assert scored.shape == (2, 3, 1)
    assert scored[..., 0].tolist() == [[2.5, 3.5, 1.5], [-0.5, 5.5, 100.5]]


def test_attributes_are_kept_apart_or_merged():
    # the second attribute is h0 + h1: 8 and 7
    assert head(**TWO_ATTRIBUTES)(HIDDEN, LENGTHS).tolist() == [[1.5, 8.0], [5.5, 7.0]]
    merged = head(**TWO_ATTRIBUTES, merge_attributes=True)
    assert merged(HIDDEN, LENGTHS).tolist() == [[4.75], [6.25]]
    weighted = head(**TWO_ATTRIBUTES, merge_attributes=True, attribute_weights=[2.0, -0.5])
    assert weighted(HIDDEN, LENGTHS).tolist() == [[-1.0], [7.5]]
    sequence = head(**TWO_ATTRIBUTES, merge_attributes=True, output_sequence=True)
    assert sequence(HIDDEN, LENGTHS)[0].tolist() == [[1.75], [3.25], [4.75]]


# 1 + 2**-12 is not representable in bfloat16: it would become 1, and so would the reward.
FINE = 1 + 2**-12


def test_an_fp32_head_scores_bf16_hidden_states_in_fp32():
    fine = head(weight=((FINE, 0.0),), bias=(0.0,))
    hidden = HIDDEN.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rewards = fine(hidden, torch.tensor([1, 2]))
    assert rewards.dtype == torch.float32 and rewards.tolist() == [[FINE], [4 * FINE]]


def test_the_head_keeps_its_dtype_when_the_model_is_cast():
    fine = head().bfloat16()
    fine.keep_dtype()
    with torch.no_grad():
        fine.weight.copy_(torch.tensor([[FINE, 0.0]]))
    assert fine.weight[0, 0].item() == FINE
    follows = head(dtype=None)
    assert follows(HIDDEN, LENGTHS).dtype == torch.float32
    assert head(dtype=torch.bfloat16)(HIDDEN, LENGTHS).dtype == torch.bfloat16


def test_options_that_contradict_each_other():
    with pytest.raises(ConfigError, match=r"attribute_weights has 1 entries for num_attributes=2"):
        head(**TWO_ATTRIBUTES, attribute_weights=[1.0])
    with pytest.raises(ConfigError, match=r"output_sequence and model\.use_avg_pool exclude each other"):
        head(output_sequence=True, use_avg_pool=True)


def test_fp8_is_refused():
    with pytest.raises(ConfigError, match=r"model\.fp8"):
        GPTRewardModel(config(fp8="e4m3"), head_options={})
