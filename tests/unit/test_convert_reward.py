"""Hugging Face sequence classifiers as reward models: equal scores, and what is refused."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
from omegaconf import OmegaConf, open_dict
from pytorch_lightning import Trainer
from transformers import LlamaForSequenceClassification

from nemo_aligner.convert.hf_to_nemo import convert
from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import (
    MegatronGPTRegressionRewardModel,
    MegatronGPTRewardModel,
)
from nemo_aligner.models.nlp.gpt.reward_model_classes import REWARD_MODEL_CLASS_DICT, RewardModelType
from nemo_aligner.utils.utils import load_and_override_model_config, load_checkpoint_model_config, load_from_nemo
from tests.tiny import save_tiny_llama

SERVER_CONFIG = Path(__file__).parents[2] / "configs/inference_rm.yaml"
PAD = 0
LENGTHS = torch.tensor([17, 4, 1, 11])


def save_classifier(folder, num_labels, **config):
    return save_tiny_llama(
        folder, model_class=LlamaForSequenceClassification, num_labels=num_labels, pad_token_id=PAD, **config
    )


def serve(archive, precision=32):
    """The model as examples/nlp/gpt/serve_reward_model.py builds it on a CPU, with only the precision set."""
    cfg = OmegaConf.load(SERVER_CONFIG)
    cfg.trainer.precision = precision
    OmegaConf.resolve(cfg)
    model_cfg = load_and_override_model_config(str(archive), cfg.model)
    with open_dict(model_cfg):
        model_cfg.use_cpu_initialization = True
    trainer = Trainer(
        devices=1, num_nodes=1, accelerator="cpu", strategy=NLPDDPStrategy(), logger=False, enable_checkpointing=False
    )
    model_class = REWARD_MODEL_CLASS_DICT[RewardModelType(model_cfg.reward_model_type)]
    model = load_from_nemo(model_class, model_cfg, trainer, restore_path=str(archive))
    model.freeze()
    model.prepare_for_inference()
    return model


def ragged_tokens():
    tokens = torch.randint(1, 300, (len(LENGTHS), 17), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.arange(17) < LENGTHS.unsqueeze(-1), tokens, PAD)


def scores_of_hugging_face(folder):
    tokens = ragged_tokens()
    with torch.no_grad():
        return LlamaForSequenceClassification.from_pretrained(folder).eval()(tokens, tokens != PAD).logits


def shard(folder):
    LlamaForSequenceClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="100kB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def as_torch_file(folder):
    LlamaForSequenceClassification.from_pretrained(folder).save_pretrained(folder, safe_serialization=False)
    (folder / "model.safetensors").unlink()
    assert (folder / "pytorch_model.bin").is_file()


@pytest.mark.parametrize(
    ("num_labels", "config", "layout", "model_class"),
    [
        (1, {}, None, MegatronGPTRewardModel),
        (1, {"tie_word_embeddings": False, "vocab_size": 331}, as_torch_file, MegatronGPTRewardModel),
        (3, {"num_key_value_heads": 1}, shard, MegatronGPTRegressionRewardModel),
    ],
    ids=["one_label", "bin", "sharded_three_labels"],
)
def test_a_served_model_gives_hugging_faces_scores(tmp_path, num_labels, config, layout, model_class):
    folder = save_classifier(tmp_path / "hf", num_labels, num_hidden_layers=2, **config)
    if layout is not None:
        layout(folder)
    convert(folder, tmp_path / "reward.nemo")
    model = serve(tmp_path / "reward.nemo")
    assert type(model) is model_class
    ours, theirs = model.infer((ragged_tokens(), LENGTHS)), scores_of_hugging_face(folder)
    assert ours.shape == theirs.shape == (4, num_labels) and theirs.std() > 0.5
    # two implementations of one fp32 forward pass
    assert (ours - theirs).abs().max() <= 1e-5


def test_bf16_rounds_everything_but_the_head(tmp_path):
    folder = save_classifier(tmp_path / "hf", num_labels=1, num_hidden_layers=1)
    convert(folder, tmp_path / "reward.nemo", precision="bf16")
    (module,) = serve(tmp_path / "reward.nemo", precision="bf16").get_model_module_list()
    theirs = LlamaForSequenceClassification.from_pretrained(folder)
    assert torch.equal(module.embedding.word_embeddings.weight, theirs.model.embed_tokens.weight.bfloat16())
    assert torch.equal(module.rm_head.weight, theirs.score.weight)
    assert not torch.equal(theirs.score.weight, theirs.score.weight.bfloat16().float())


def test_the_archive_ends_in_one_head(tmp_path):
    convert(save_classifier(tmp_path / "hf", num_labels=2, num_hidden_layers=1), tmp_path / "reward.nemo")
    with tarfile.open(tmp_path / "reward.nemo") as archive:
        metadata = archive.extractfile("./model_weights/.metadata").read()
    assert b"rm_head.weight" in metadata and b"output_layer" not in metadata
    cfg = load_checkpoint_model_config(str(tmp_path / "reward.nemo"))
    assert (cfg.reward_model_type, cfg.regression) == ("regression", {"num_attributes": 2})
    (module,) = serve(tmp_path / "reward.nemo").get_model_module_list()
    assert module.rm_head.bias.tolist() == [0, 0]


def test_a_missing_head_is_named(tmp_path):
    folder = save_tiny_llama(tmp_path / "hf", num_hidden_layers=1)  # a language model, relabelled as a classifier
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"hf: the checkpoint has no tensor 'score\.weight'$"):
        convert(folder, tmp_path / "never.nemo")
    assert not (tmp_path / "never.nemo").exists()


def test_other_classifiers_are_refused(tmp_path):
    folder = save_classifier(tmp_path / "hf", num_labels=1, num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForTokenClassification"]}))
    message = r"'LlamaForTokenClassification': only LlamaForCausalLM and LlamaForSequenceClassification .* supported$"
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "never.nemo")
