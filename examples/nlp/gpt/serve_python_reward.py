"""Serve a Python reward function over HTTP; see configs/inference_python_reward.yaml for every setting.

    python examples/nlp/gpt/serve_python_reward.py reward.target=rewards.py:exact_match tokenizer=policy.nemo

nemo_aligner/rewards/python_reward.py documents the arguments that the function receives. The server needs neither a GPU
nor a model. The trainer finds the server through `remote_rm.reward_model`. If the trainer runs on another machine, set
inference.address=0.0.0.0 here.
"""

from nemo.core.config import hydra_runner
from omegaconf import OmegaConf

from nemo_aligner.algorithms.python_reward_server import PythonRewardServer
from nemo_aligner.generation.ends import check_end_strings
from nemo_aligner.models.nlp.gpt.hf_tokenizer import load_tokenizer
from nemo_aligner.rewards.python_reward import load_reward_function
from nemo_aligner.servers.triton_endpoint import LOOPBACK, check_inference_config, check_port_is_free
from nemo_aligner.utils.interpolations import resolve_interpolations
from nemo_aligner.utils.train_script_utils import exit_on_config_error
from nemo_aligner.utils.value_rules import Rule, check_section


@hydra_runner(config_path="../../../configs", config_name="inference_python_reward")
def main(cfg) -> None:
    with exit_on_config_error():
        serve(cfg)


def serve(cfg) -> None:
    resolve_interpolations(cfg)
    endpoint = check_inference_config(cfg.get("inference"))
    check_port_is_free(endpoint.get("address", LOOPBACK), endpoint["port"])
    check_section(cfg, {"reward": Rule(OmegaConf.is_dict, "a section with target and kwargs")}, {})
    function = load_reward_function(cfg.reward.target, cfg.reward.kwargs, key="reward")
    tokenizer = load_tokenizer(cfg.tokenizer)
    check_end_strings(cfg.end_strings, tokenizer, key="end_strings")
    PythonRewardServer(function, tokenizer, end_strings=list(cfg.end_strings), **endpoint).run_server()


if __name__ == "__main__":
    main()
