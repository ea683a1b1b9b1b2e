"""Run the training script with an error on one rank, given by FAIL="<place>:<rank>" in the environment.

The place `score` runs the reward model's server instead. The place `select` drops one rollout instead of raising an
error.
"""

import os
from pathlib import Path

import torch

import nemo_aligner.compat.quiet_imports  # noqa: F401  as the script itself
from nemo_aligner.algorithms.rs import RSTrainer
from nemo_aligner.data.nlp.datasets import RLHFDataset
from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import MegatronGPTRewardModel
from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel

SCRIPTS = Path(__file__).parents[2] / "examples/nlp/gpt"
PLACES = {
    "infer": (MegatronGPTRSModel, "infer_each", RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")),
    "loss": (MegatronGPTRSModel, "_normalized_loss", ValueError("a loss that is none")),
    "data": (RLHFDataset, "__getitem__", RuntimeError("the prompts are odd")),
    "disk": (RLHFDataset, "__getitem__", OSError("the prompts are gone")),
    "select": (RSTrainer, "_select", None),
    "score": (MegatronGPTRewardModel, "infer", MemoryError("no room")),
}


def fail(place: str, rank: int) -> None:
    owner, name, error = PLACES[place]
    method = getattr(owner, name)

    def failing(self, *args, **kwargs):
        if torch.distributed.get_rank() != rank:
            return method(self, *args, **kwargs)
        if error is not None:
            raise error
        return {key: value[:-1] for key, value in method(self, *args, **kwargs).items()}

    setattr(owner, name, failing)


if __name__ == "__main__":
    place, rank = os.environ["FAIL"].split(":")
    fail(place, int(rank))
    script = SCRIPTS / ("serve_reward_model.py" if place == "score" else "train_gpt_rs_actor.py")
    # not runpy: it would make Lightning start the script itself, without the error, on the other ranks
    exec(compile(script.read_text(), str(script), "exec"))
