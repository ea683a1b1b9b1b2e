"""The classes of the configurable kinds of reward models."""

from enum import Enum

from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import (
    MegatronGPTRegressionRewardModel,
    MegatronGPTRewardModel,
)


class RewardModelType(Enum):
    """The values of `model.reward_model_type`."""

    BINARY_RANKING = "binary_ranking"
    REGRESSION = "regression"


REWARD_MODEL_CLASS_DICT = {
    RewardModelType.BINARY_RANKING: MegatronGPTRewardModel,
    RewardModelType.REGRESSION: MegatronGPTRegressionRewardModel,
}
