"""A reward model made from a tiny base model agrees with Hugging Face's hidden states, and on 1 and 4 ranks."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from nemo.utils import AppState

from nemo_aligner.servers.http_communicator import HTTPCommunicator
from tests.distributed.launch import run_ranks
from tests.hurtable_server import skip_if_triton_cannot_run
from tests.ports import free_port

TOKENS = torch.arange(4 * 9).reshape(4, 9) * 7 % 300
LENGTHS = torch.tensor([9, 4, 1, 6])
SENTENCES = ["the quick brown fox", "one two"]
MEAN, STD = -0.5, 4.0


def load_reward_model(nemo_path, world_size=1, load_base_model_only=False, **model_overrides):
    """Must run in a process of `run_ranks` whose model-parallel groups exist."""
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
    from omegaconf import OmegaConf, open_dict
    from pytorch_lightning import Trainer

    from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import MegatronGPTRewardModel
    from nemo_aligner.utils.utils import load_checkpoint_model_config, load_from_nemo

    cfg = load_checkpoint_model_config(str(nemo_path))
    with open_dict(cfg):
        for key, value in {"forward_micro_batch_size": 2, "global_batch_size": 0, **model_overrides}.items():
            OmegaConf.update(cfg, key, value, force_add=True)
    trainer = Trainer(
        devices=world_size, num_nodes=1, accelerator="cpu", strategy=NLPDDPStrategy(), logger=False,
        enable_checkpointing=False,
    )  # fmt: skip
    model = load_from_nemo(
        MegatronGPTRewardModel,
        cfg,
        trainer,
        restore_path=str(nemo_path),
        load_base_model_only=load_base_model_only,
    )
    model.freeze()
    model.prepare_for_inference()
    return model


def rewards_of_hugging_face(folder, weight, bias):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = model(TOKENS).last_hidden_state
    return hidden[torch.arange(len(TOKENS)), LENGTHS - 1] @ weight.T + bias


def error_of(function):
    try:
        function()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


def from_base_model(rank, tiny_nemo, tiny_hf, archive):
    parallel_state.initialize_model_parallel()
    base = load_reward_model(tiny_nemo, load_base_model_only=True)
    (module,) = base.get_model_module_list()
    with torch.no_grad():
        module.rm_head.weight.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(1)))
        module.rm_head.bias.fill_(0.25)
    found = {
        "hugging_face": rewards_of_hugging_face(tiny_hf, module.rm_head.weight, module.rm_head.bias),
        "rewards": base.infer((TOKENS, LENGTHS)),
        "dtype": str(base.infer((TOKENS, LENGTHS)).dtype),
        "one_pass": in_one_pass(base),
        "other_padding": base.infer((torch.where(torch.arange(9) < LENGTHS[:, None], TOKENS, 5), LENGTHS)),
        "sentences": base.infer(SENTENCES),
        "as_ids": base.infer(ids_of(SENTENCES, base.tokenizer)),
        "uneven": error_of(lambda: base.infer((TOKENS[:3], LENGTHS[:3]))),
        "number": error_of(lambda: base.infer(3)),
        "training": error_of(lambda: base.get_loss_and_metrics({}, forward_only=True)),
        "keys": sorted(key for key in base.sharded_state_dict() if "rm_head" in key or "output_layer" in key),
    }
    AppState().data_parallel_rank = 0  # NeMo's strategy sets it when it starts the processes; not done here
    base.save_to(archive)

    standardized = {"enable": True, "mean": MEAN, "std": STD}
    found["standardized"] = load_reward_model(archive, reward_standardization=standardized).infer((TOKENS, LENGTHS))
    half = load_reward_model(archive, precision="bf16", megatron_amp_O2=True)
    (half_module,) = half.get_model_module_list()
    found["half"] = half.infer((TOKENS, LENGTHS))
    found["half_body"] = str(half_module.embedding.word_embeddings.weight.dtype)
    found["half_head_is_exact"] = torch.equal(half_module.rm_head.weight, module.rm_head.weight)
    found["refused"] = [
        error_of(functools.partial(load_reward_model, archive, **change))
        for change in (
            {"reward_standardization": {**standardized, "std": 0}},
            {"reward_standardization": {"enable": True, "mean": None, "std": 1.0}},
            {"sequence_parallel": True},
            {"virtual_pipeline_model_parallel_size": 2},
            {"mcore_gpt": False},
        )
    ]
    return as_lists(found)


def as_lists(found):
    """Convert tensors, which do not survive the process that sends them."""
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


def in_one_pass(model):
    model.forward_micro_batch_size = 64
    rewards = model.infer((TOKENS, LENGTHS))
    model.forward_micro_batch_size = 2
    return rewards


def ids_of(sentences, tokenizer):
    rows = [torch.tensor(tokenizer.text_to_ids(sentence)) for sentence in sentences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def from_archive(rank, archive):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    model = load_reward_model(
        archive, world_size=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, reward_standardization={
            "enable": True, "mean": MEAN, "std": STD
        },
    )  # fmt: skip
    return model.infer((TOKENS, LENGTHS)).tolist()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return str(tmp_path_factory.mktemp("reward_model") / "reward.nemo")


@pytest.fixture(scope="module")
def one_rank(tiny_nemo, tiny_hf, archive):
    (found,) = run_ranks(from_base_model, 1, tiny_nemo, tiny_hf, archive)
    return found


def rewards_of(found, key):
    return torch.tensor(found[key])


def test_rewards_are_the_head_on_hugging_faces_hidden_states(one_rank):
    assert rewards_of(one_rank, "rewards").shape == (4, 1) and one_rank["dtype"] == "torch.float32"
    # two implementations of one fp32 forward pass; rewards are of order 1 to 10
    torch.testing.assert_close(
        rewards_of(one_rank, "rewards"), rewards_of(one_rank, "hugging_face"), atol=2e-5, rtol=1e-5
    )
    assert rewards_of(one_rank, "rewards").std() > 1


def test_rewards_depend_neither_on_padding_nor_on_the_split_into_passes(one_rank):
    torch.testing.assert_close(
        rewards_of(one_rank, "other_padding"), rewards_of(one_rank, "rewards"), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(rewards_of(one_rank, "one_pass"), rewards_of(one_rank, "rewards"), atol=1e-5, rtol=1e-5)


def test_strings_are_tokenised(one_rank):
    assert rewards_of(one_rank, "sentences").shape == (2, 1)
    torch.testing.assert_close(rewards_of(one_rank, "sentences"), rewards_of(one_rank, "as_ids"), atol=1e-5, rtol=1e-5)


def test_standardisation(one_rank):
    torch.testing.assert_close(
        rewards_of(one_rank, "standardized"), (rewards_of(one_rank, "rewards") - MEAN) / STD, atol=1e-6, rtol=1e-6
    )


def test_a_half_precision_model_keeps_its_head_in_fp32(one_rank):
    assert one_rank["half_body"] == "torch.bfloat16" and one_rank["half_head_is_exact"]
    # bf16 has 8 bits: four layers and a sum over 64 channels of order 1 leave about 0.1
    torch.testing.assert_close(rewards_of(one_rank, "half"), rewards_of(one_rank, "rewards"), atol=0.3, rtol=0.03)


def test_the_archive_has_a_head_and_no_output_layer(one_rank):
    assert one_rank["keys"] == ["model.rm_head.bias", "model.rm_head.weight"]


def test_what_cannot_be_inferred_is_refused(one_rank):
    assert one_rank["uneven"].startswith(
        "ValueError: 3 rows cannot be split into forward passes of model.forward_micro"
    )
    assert one_rank["number"] == "NotImplementedError: infer takes (tokens, lengths) or a list of strings, not int"
    assert one_rank["training"].startswith("NotImplementedError: this library runs reward models for inference only")


def test_configurations_that_cannot_work_are_refused(one_rank):
    named = ["reward_standardization", "reward_standardization", "sequence_parallel", "virtual_pipeline", "mcore_gpt"]
    for message, key in zip(one_rank["refused"], named, strict=True):
        assert message.startswith(f"ConfigError: model.{key}")


def test_four_ranks_agree_with_one(one_rank, archive):
    for rewards in run_ranks(from_archive, 4, archive):
        torch.testing.assert_close(torch.tensor(rewards), rewards_of(one_rank, "standardized"), atol=1e-5, rtol=1e-5)


def environment():
    """The environment without what models built in this process have set for their process group."""
    return {key: value for key, value in os.environ.items() if key not in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")}


def test_the_script_serves_the_archive(one_rank, archive, tmp_path):
    skip_if_triton_cannot_run()
    root, port = Path(__file__).parents[2], free_port()
    command = [
        sys.executable, "examples/nlp/gpt/serve_reward_model.py", f"rm_model_file={archive}", f"inference.port={port}",
        "trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32",
        "model.reward_standardization.enable=True",
        f"model.reward_standardization.mean={MEAN}", f"model.reward_standardization.std={STD}",
        "inference.strip_sequence_length_to_multiple=8",
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=root, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    communicator = HTTPCommunicator()
    try:
        while not communicator.is_ready("reward_model", "localhost", port, wait_s=2):
            assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
        communicator.add_server_by_name("reward_model", "localhost", port)
        request = {
            "tokens": torch.nn.functional.pad(TOKENS, (0, 20)).numpy(),
            "sequence_lengths": LENGTHS.unsqueeze(-1).numpy(),
        }
        reply = communicator.send_data_to_server("reward_model", request).result(timeout=60)
    finally:
        communicator.close()
        process.terminate()
        process.wait()
    torch.testing.assert_close(
        torch.from_numpy(reply["rewards"].copy()), rewards_of(one_rank, "standardized"), atol=1e-5, rtol=1e-5
    )


def test_the_script_refuses_a_missing_archive_in_one_line():
    command = [sys.executable, "examples/nlp/gpt/serve_reward_model.py", "rm_model_file=nowhere.nemo"]
    answer = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-1].startswith("error: rm_model_file: nowhere.nemo does not exist")
