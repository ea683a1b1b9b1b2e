"""Parallel layouts that a configuration cannot have are refused before any model is loaded."""

import pytest
import torch
from omegaconf import OmegaConf

from nemo_aligner.compat import virtual_stages
from nemo_aligner.utils.config_checks import check_rs_config
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.parallel_checks import check_parallel
from tests.unit.working_config import config, refusal

VPP = "++model.virtual_pipeline_model_parallel_size=2"
PP = "model.pipeline_model_parallel_size"
TP = "model.tensor_model_parallel_size"
RECOMPUTE = "++model.activations_checkpoint_granularity=full"


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([f"{TP}=2", "++model.num_attention_heads=9"], f"{TP}=2 must divide the model's num_attention_heads=9"),
        ([f"{TP}=2", "++model.num_query_groups=3"], f"{TP}=2 must divide the model's num_query_groups=3"),
        ([f"{TP}=2", "++model.ffn_hidden_size=129"], f"{TP}=2 must divide the model's ffn_hidden_size=129"),
        ([f"{TP}=2", "++model.override_vocab_size=321"], f"{TP}=2 must divide the model's override_vocab_size=321"),
        ([f"{TP}=2", "++model.perform_initialization=False"], "model.perform_initialization=False would"),
        ([f"{PP}=2", "++model.num_layers=5"], f"num_layers=5 must be a multiple of {PP}=2"),
        (
            [f"{PP}=2", VPP, "++model.num_layers=6"],
            f"num_layers=6 must be a multiple of {PP}=2 * model.virtual_pipeline_model_parallel_size=2",
        ),
        ([VPP], f"model.virtual_pipeline_model_parallel_size=2 needs {PP} of 2 or more"),
        (
            [f"{PP}=2", VPP, "model.global_batch_size=8", "model.micro_batch_size=8"],
            "model.global_batch_size=8 / (model.micro_batch_size=8 * 1 data-parallel replicas) = 1",
        ),
        ([f"{PP}=2", VPP, "++model.batch_p2p_comm=True"], "model.batch_p2p_comm=True would confuse"),
        ([f"{PP}=2", VPP, "++model.overlap_p2p_comm=True"], "model.overlap_p2p_comm=True is not supported on a CPU"),
        (["++model.activations_checkpoint_granularity=some"], "must be null, selective or full"),
        ([RECOMPUTE], "model.activations_checkpoint_method=None must be uniform or block"),
        (
            [RECOMPUTE, "++model.activations_checkpoint_method=block"],
            "model.activations_checkpoint_num_layers=None must be a positive whole number",
        ),
        (
            ["++model.activations_checkpoint_granularity=selective", "++model.activations_checkpoint_num_layers=1"],
            "model.activations_checkpoint_num_layers must be null",
        ),
        (
            [
                RECOMPUTE, "++model.activations_checkpoint_method=uniform",
                "++model.activations_checkpoint_num_layers=2", f"{PP}=2", "++model.num_layers=6",
            ],
            "model.activations_checkpoint_num_layers=2 must divide the 3 layers",
        ),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_split_so_is_refused(files, overrides, message):
    assert message in refusal(*overrides)


def test_layouts_that_work_pass(files, monkeypatch):
    sizes = ["++model.num_layers=8", "++model.num_attention_heads=4", "++model.num_query_groups=2"]
    for layout in ([f"{PP}=2", VPP], [f"{PP}=2", VPP, "++model.batch_p2p_comm=False"], [f"{TP}=2"]):
        check_rs_config(config(*sizes, *layout))


def test_virtual_stages_in_bf16_need_O2(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    overrides = ("trainer.accelerator=gpu", "trainer.precision=bf16", "model.megatron_amp_O2=False", f"{PP}=2", VPP)
    assert "needs model.megatron_amp_O2=True with trainer.precision=bf16" in refusal(*overrides)
    for spelling in ("bf16-mixed", "16-mixed", 16):  # checked by dtype, however it is spelled
        cfg = config(*overrides, f"trainer.precision={spelling}")
        with pytest.raises(ConfigError, match=f"needs model.megatron_amp_O2=True with trainer.precision={spelling}"):
            check_parallel(cfg)
    for spelling in ("32-true", 32):
        check_parallel(config(*overrides, f"trainer.precision={spelling}"))


def test_messages_are_batched_where_their_order_tells_them_apart():
    def batched(stages, **keys):
        cfg = OmegaConf.create({"pipeline_model_parallel_size": stages, **keys})
        virtual_stages.choose_messages(cfg)
        return cfg.get("batch_p2p_comm")

    assert batched(2) is None and batched(4) is None
    assert batched(2, virtual_pipeline_model_parallel_size=2) is False
    assert batched(4, virtual_pipeline_model_parallel_size=2) is True
    assert batched(4, virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=True) is False


def test_sequence_parallelism_needs_tensor_parallelism(files):
    assert refusal("model.sequence_parallel=True") == (
        "model.sequence_parallel=True needs model.tensor_model_parallel_size of 2 or more; set it to False"
    )
