"""Mistakes in a configuration are refused with one line that names them, before any model is loaded."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_aligner.generation.rollouts import GenerationSettings
from nemo_aligner.models.nlp.gpt.training_settings import TrainingSettings
from nemo_aligner.utils.config_checks import MODEL_RS_KEYS, SAMPLING_KEYS, TRAINER_RS_KEYS, check_rs_config
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.misspelt_keys import warn_of_misspelt_keys
from tests.unit.working_config import CONFIGS, config, refusal


def test_a_working_configuration_passes(files, monkeypatch):
    check_rs_config(config())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # Apex, as it were
    streamed = ("model.optim.name=distributed_fused_adam", "trainer.precision=bf16", "model.megatron_amp_O2=True")
    check_rs_config(config(*streamed, "model.rs.training.stream_adam_states=True"))
    check_rs_config(config(*streamed, "model.rs.training.max_tokens_per_pack=8192"))


def test_a_buffer_of_parameters_sends_them_in_their_own_type(files, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # Apex, as it were
    apex = ("model.optim.name=distributed_fused_adam", "+model.optim.param_sync_dtype=bf16")
    check_rs_config(config(*apex, "trainer.precision=bf16", "model.megatron_amp_O2=True"))
    in_float32 = ("trainer.precision=32", "model.megatron_amp_O2=False")
    check_rs_config(config(*apex, *in_float32, "model.optim.contiguous_param_buffer=False"))
    message = refusal(*apex, *in_float32)
    assert message.startswith("model.optim.param_sync_dtype=bf16: parameters of torch.float32 are sent")
    assert "contiguous_param_buffer=False" in message


@pytest.mark.parametrize(
    "key",
    ["trainer.rs.save_interval", "trainer.rs.max_steps", "model.rs.num_val_samples", "model.rs.sampling_params.top_k",
     "model.rs.sampling_params.temperature", "model.rs.sampling_params.end_strings", "model.data.seq_length",
     "model.rs.length_params.max_length", "model.optim.name", "model.optim.lr", "model.seed"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["null", "-1.5", "true"])
def test_values_of_a_wrong_kind_are_refused_before_anything_is_computed(files, key, value):
    assert refusal(f"{key}={value}").startswith(f"{key}=")


def test_a_single_string_is_no_list_of_end_strings(files):
    """Otherwise each of its characters would end a response."""
    assert "must be a list of strings" in refusal("model.rs.sampling_params.end_strings=stop")


def test_several_nodes_need_someone_who_starts_them(files, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    nodes = ("trainer.num_nodes=2", "trainer.devices=1")
    assert "srun or torchrun" in refusal(*nodes)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    check_rs_config(config(*nodes))


def test_a_section_without_keys_is_refused(files):
    assert refusal("model.rs.length_params=null") == (
        "model.rs.length_params=None must be a section with keys, of max_length, min_length"
    )


@pytest.mark.parametrize(
    "section",
    ["exp_manager", "exp_manager.checkpoint_callback_params", "model.data", "model.optim", "model.optim.sched",
     "model.peft"],
)  # fmt: skip
def test_a_word_is_no_section(files, section):
    cfg = config()
    OmegaConf.set_struct(cfg, False)
    OmegaConf.update(cfg, section, "word")
    with pytest.raises(ConfigError, match=f"{section}='word' must be a section with keys"):
        check_rs_config(cfg)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+exp_manager.resum_if_exists=True", "exp_manager.resum_if_exists: Key 'resum_if_exists' not in"),
        ("exp_manager.resume_if_exists=word", "exp_manager.resume_if_exists: Value 'word' is not a valid bool"),
        ("exp_manager.resume_from_checkpoint=nowhere", "exp_manager.resume_from_checkpoint=nowhere is no checkpoint"),
        ("trainer.logger=null", "trainer.logger=None must be False"),
        ("trainer.enable_checkpointing=True", "trainer.enable_checkpointing=True must be False"),
        ("trainer.max_steps=null", r"trainer.max_steps=None must be -1 \(trainer.rs.max_steps\)"),
        ("trainer.max_time=word", "trainer.max_time='word' must be null, or a time"),
        ("model.mcore_gpt=False", "model.mcore_gpt=False must be true"),
        ("model.megatron_amp_O2=word", "model.megatron_amp_O2='word' must be true or false"),
        ("model.precision=word", "model.precision=word must be trainer.precision=32"),
        ("+exp_manager.checkpoint_callback_params.save_weights_only=True", "save_weights_only=True must be false"),
        ("exp_manager.checkpoint_callback_params.filename='{step}/x'", "filename='{step}/x' must be a name without"),
        ("+exp_manager.ema.enable=True", "exp_manager.ema.enable=True must be false: averages"),
        ("exp_manager.resume_from_checkpoint=3", "resume_from_checkpoint=3 must be the path of a checkpoint"),
        ("+model.dist_ckpt_format=foo", "model.dist_ckpt_format='foo' must be zarr or torch_dist"),
        ("+model.position_embedding_type=foo", "position_embedding_type='foo' must be learned_absolute, rope or none"),
        ("model.data.data_prefix=3", "model.data.data_prefix=3 must be {train: "),
        ("+model.context_parallel_size=a", "model.context_parallel_size='a' must be a positive whole number"),
        ("+model.optim.eps=a", "model.optim.eps='a' must be a number, 0 or larger"),
        ("+model.optim.sched.max_steps=a", "model.optim.sched.max_steps='a' must be a positive whole number"),
        ("trainer.max_epochs=abc", "trainer.max_epochs='abc' must be a whole number"),
        ("+trainer.fast_dev_run=True", "trainer.fast_dev_run=True must be false"),
        ("+trainer.strategy=ddp", "trainer.strategy='ddp' must be left out: the library sets it"),
        ("model.seed=4294967296", "model.seed=4294967296 must be a whole number, 0 to 4294967295"),
        ("model.data.reset_attention_mask=word", "model.data.reset_attention_mask='word' must be true or false"),
        ("model.optim.sched=null", "model.optim.sched=None must be a section with keys"),
        ("model.optim.sched.name=null", "model.optim.sched.name=None must be one of CosineAnnealing"),
        ("model.optim.sched.warmup_steps=word", "model.optim.sched.warmup_steps='word' must be a whole number"),
        ("model.optim.sched.min_lr=1", "model.optim.sched.min_lr=1 must be less than model.optim.lr=9e-07"),
        ("model.optim.sched.min_lr=9e-7", "model.optim.sched.min_lr=9e-07 must be less than"),
        ("+model.optim.sched.warmup_step=3", "warmup_step is not a setting of CosineAnnealing, which has constant_"),
        ("+model.optim.weigth_decay=0.1", "model.optim.weigth_decay is not a setting of adamw, which has amsgrad"),
        ("model.optim.name=sgd", r"model.optim.betas is not a setting of sgd, .* remove it \(~model.optim.betas\)"),
    ],
)
def test_what_nemo_and_lightning_would_refuse_later_on_or_pass_over(files, override, words):
    with pytest.raises(ConfigError, match=words):
        check_rs_config(config(override))


def test_optimizers_and_schedules_with_settings_of_their_own(files):
    check_rs_config(config("model.optim.name=sgd", "~model.optim.betas", "+model.optim.momentum=0.9"))
    check_rs_config(config("model.optim.name=mcore_distributed_optim", "+model.optim.grad_sync_dtype=fp32"))
    polynomial = ("model.optim.sched.name=PolynomialDecayAnnealing", "~model.optim.sched.constant_steps")
    check_rs_config(config(*polynomial, "+model.optim.sched.power=2.0", "model.optim.sched.min_lr=9e-7"))
    check_rs_config(config("~model.optim.sched", "model.optim.lr=0"))


def test_the_reward_model_s_server_looks_at_its_machine_first(files, monkeypatch):
    script = CONFIGS.parent / "examples/nlp/gpt/serve_reward_model.py"
    spec = importlib.util.spec_from_file_location("serve_reward_model", script)
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("inference_rm", overrides=["rm_model_file=model.nemo", "trainer.devices=1"])
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu, but this machine has no GPU"):
        server.serve(cfg.copy())
    cfg.trainer.devices = "word"
    with pytest.raises(ConfigError, match=r"trainer\.devices='word' must be a positive whole number"):
        server.serve(cfg)


def test_torchrun_has_to_start_as_many_processes_as_there_are_devices(files, monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    check_rs_config(config())
    assert refusal("trainer.devices=1") == (
        "trainer.devices=1 must be 2, as many processes as torchrun has started on this node (--nproc-per-node)"
    )


def test_the_time_limit_of_a_run(files):
    check_rs_config(config("exp_manager.max_time_per_run='00:03:45:00'"))
    assert "exp_manager.max_time_per_run='4h' must be null, or a time" in refusal("exp_manager.max_time_per_run=4h")


# ---- the contents of every YAML file


@pytest.mark.parametrize("name", ["gpt_rs_actor", "quickstart"])
def test_a_yaml_file_documents_exactly_the_known_keys(name):
    cfg = config(name=name)
    assert set(cfg.trainer.rs) == TRAINER_RS_KEYS
    assert set(cfg.model.rs) == MODEL_RS_KEYS
    assert set(cfg.model.rs.sampling_params) == SAMPLING_KEYS
    assert set(cfg.model.rs.length_params) == {"max_length", "min_length"}
    assert set(cfg.model.rs.reward) == {"target", "kwargs"}


def test_the_yaml_file_says_what_holds_without_its_newer_sections():
    rs = config().model.rs
    assert GenerationSettings(**rs.generation) == GenerationSettings()
    assert TrainingSettings(**rs.training) == TrainingSettings()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_file_loads_and_resolves(path):
    with initialize_config_dir(str(path.parent), version_base=None):
        cfg = compose(path.stem)
    OmegaConf.resolve(cfg)
    assert not OmegaConf.missing_keys(cfg)


# ---- mistakes


@pytest.mark.parametrize(
    "section, key, nearest",
    [
        ("trainer.rs", "max_step", "max_steps"),
        ("model.rs", "top_n_rollout", "top_n_rollouts"),
        ("model.rs.sampling_params", "temprature", "temperature"),
        ("model.rs.length_params", "max_len", "max_length"),
        ("model.rs.reward", "targets", "target"),
        ("model.rs.generation", "back_end", "backend"),
        ("model.rs.training", "pack", "packing"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_known_one(files, section, key, nearest):
    message = refusal(f"++{section}.{key}=1")
    assert message == f"{section}.{key} is not a known key; did you mean {section}.{nearest}?"


def test_keys_of_a_subclass_are_warned_of(files, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda line, **_: lines.append(line))
    check_rs_config(config("+model.rs.entropy_bonus=0.1", "+trainer.rs.wandb_tags=[a]"))
    said = [line.split(" is not a key of this library")[0] for line in lines if "not a key of this library" in line]
    assert said == ["trainer.rs.wandb_tags", "model.rs.entropy_bonus"]


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["trainer.precision=16"], ["trainer.precision=16 is not supported", "bf16 or 32"]),
        (["trainer.precision=16-mixed"], ["trainer.precision=16-mixed is not supported"]),
        (["trainer.precision=bf16-true"], ["trainer.precision=bf16-true is not supported", "bf16 or 32"]),
        (
            ["trainer.precision=bf16", "model.megatron_amp_O2=False"],
            ["trainer.precision=bf16", "on a CPU only with model.megatron_amp_O2=True"],
        ),
        (["++model.context_parallel_size=2"], ["model.context_parallel_size", "must be 1"]),
        (
            ["model.optim.name=mcore_distributed_optim", "+model.optim.overlap_param_gather_with_optimizer_step=True"],
            ["model.optim.overlap_param_gather_with_optimizer_step=True", "False"],
        ),
        (["trainer.devices=auto"], ["trainer.devices='auto' must be a positive whole number"]),
        (["trainer.devices=-1"], ["trainer.devices=-1 must be a positive whole number"]),
        (["trainer.devices=3", "model.tensor_model_parallel_size=2"], ["= 3 must be a multiple of", "= 2"]),
        (["model.rs.top_n_rollouts=5"], ["model.rs.top_n_rollouts=5", "model.rs.num_rollouts_per_prompt=4"]),
        (["model.rs.top_n_rollouts=0"], ["model.rs.top_n_rollouts=0 must be a positive whole number"]),
        (["model.rs.num_rollout_samples=2.5"], ["model.rs.num_rollout_samples=2.5 must be a positive whole number"]),
        (["model.global_batch_size=0"], ["model.global_batch_size=0 must be a positive whole number"]),
        # divisibility: G * K by gbs, gbs by mbs * DP, G and validation prompts by rollout micro-batch * DP; DP is 2
        (
            ["model.global_batch_size=12"],
            ["model.rs.num_rollout_samples=8 * model.rs.top_n_rollouts=1", "multiple of model.global_batch_size=12"],
        ),
        (["model.micro_batch_size=3"], ["model.global_batch_size=8", "model.micro_batch_size=3 * 2 data-parallel"]),
        (["model.rs.rollout_micro_batch_size=3"], ["model.rs.num_rollout_samples=8", "rollout_micro_batch_size=3 * 2"]),
        (["model.rs.num_val_samples=6"], ["model.rs.num_val_samples=6", "val_rollout_micro_batch_size * 2", "= 4"]),
        (
            ["trainer.rs.val_check_interval=3", "trainer.rs.save_interval=4"],
            ["trainer.rs.save_interval=4", "trainer.rs.val_check_interval=3"],
        ),
        (["model.rs.loss_normalization=batch"], ["model.rs.loss_normalization='batch'", "global_batch or micro_batch"]),
        (["model.data.seq_length=5000"], ["model.data.seq_length=5000", "4096 positions", "lower seq_length"]),
        (
            ["model.data.seq_length=100", "model.rs.length_params.max_length=100"],
            ["model.rs.length_params.max_length=100", "model.data.seq_length=100", "lower max_length"],
        ),
        (["model.rs.length_params.max_length=0"], ["max_length=0 must be a positive whole number"]),
        (["model.rs.length_params.min_length=3000"], ["min_length=3000", "max_length=2048"]),
        (["model.rs.length_params.min_length=2048"], ["min_length=2048", "max_length=2048", "no response could end"]),
        (["model.rs.sampling_params.temperature=0"], ["model.rs.sampling_params.temperature=0", "use_greedy"]),
        (["model.rs.sampling_params.top_p=1.5"], ["model.rs.sampling_params.top_p=1.5", "between 0 and 1"]),
        (["model.rs.sampling_params.top_k=-1"], ["model.rs.sampling_params.top_k=-1", "0 (off) or more"]),
        (["model.rs.sampling_params.repetition_penalty=0"], ["repetition_penalty=0", "above 0"]),
        (["model.rs.sampling_params.end_strings=[1]"], ["model.rs.sampling_params.end_strings=[1]", "strings"]),
        (["model.rs.sampling_params.end_strings=['']"], ["end_strings=['']", "none of them empty"]),
        (["model.rs.generation.backend=vllm"], ["model.rs.generation.backend='vllm'", "engine"]),
        (["trainer.rs.profile=6"], ["trainer.rs.profile=6", "at most 5"]),
        (["trainer.rs.profile=yes please"], ["trainer.rs.profile='yes please'", "true"]),
        (["model.rs.generation.max_rows_in_flight=0"], ["model.rs.generation.max_rows_in_flight=0", "positive"]),
        (["model.rs.training.packing=1"], ["model.rs.training.packing=1", "true, or false"]),
        (["model.rs.training.max_tokens_per_pack=0"], ["max_tokens_per_pack=0", "a positive whole number or null"]),
        (
            ["model.rs.training.max_tokens_per_pack=8192", "model.rs.training.packing=False"],
            ["max_tokens_per_pack=8192: with model.rs.training.packing=False", "model.micro_batch_size"],
        ),
        (
            ["model.rs.training.max_tokens_per_pack=8192", "model.rs.loss_normalization=micro_batch"],
            ["max_tokens_per_pack=8192: with model.rs.loss_normalization=micro_batch", "null"],
        ),
        (["model.rs.training.stream_adam_states=1"], ["model.rs.training.stream_adam_states=1", "true or false"]),
        (
            [f"model.rs.{key}" for key in ("training.stream_adam_states=True", "offload_adam_states=False")],
            ["stream_adam_states=True needs", "model.rs.offload_adam_states=True"],
        ),
        (["trainer.rs.max_steps=-5"], ["trainer.rs.max_steps=-5", "-1 for as many"]),
        (["trainer.rs.max_epochs=-1"], ["trainer.rs.max_epochs=-1", "a positive whole number"]),
        (["trainer.accelerator=tpu"], ["trainer.accelerator='tpu' must be gpu or cpu"]),
        (["+trainer.device=5"], ["trainer.device is not a known key; did you mean trainer.devices?"]),
        (["trainer.rs.model_gbs=4"], ["trainer.rs.model_gbs=4 must be model.global_batch_size=8"]),
        (["model.optim.name=adamww"], ["model.optim.name=adamww must be one of", "adamw,"]),
        (["model.optim.sched.name=foo"], ["model.optim.sched.name=foo must be one of", "CosineAnnealing,"]),
        (["model.optim.betas=0.9"], ["model.optim.betas=0.9", "a list of two numbers"]),
        (["exp_manager.checkpoint_callback_params.monitor=null"], ["monitor=None must be the name of a metric"]),
        (["exp_manager.checkpoint_callback_params.mode=most"], ["mode='most' must be min or max"]),
        (["model.rs.sampling_params.temperature=1e-45"], ["temperature=1e-45", "use_greedy"]),
        (["model.rs.training=false"], ["model.rs.training=False", "a section with keys", "packing"]),
        (["model.rs.generation=true"], ["model.rs.generation=True", "a section with keys", "backend"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(files, overrides, parts):
    message = refusal(*overrides)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("optimizer", ["distributed_fused_adam", "fused_adam"])
def test_optimizers_of_apex_need_apex(files, optimizer, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(f"model.optim.name={optimizer}")
    advice = "use mcore_distributed_optim or adamw"
    assert message == f"model.optim.name={optimizer} needs Apex, which is not installed; {advice}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_rs_config(config(f"model.optim.name={optimizer}"))


def test_transformer_engine_s_attention_reads_no_mask(files, monkeypatch):
    overrides = ["model.data.reset_attention_mask=True", "+model.transformer_engine=True"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    message = refusal(*overrides, "trainer.accelerator=gpu")
    assert message.startswith("model.data.reset_attention_mask=True needs a mask, which Transformer Engine's causal")
    check_rs_config(config(*overrides))  # on a CPU, our own layers are used instead
    check_rs_config(config(overrides[0], "+model.transformer_engine=False", "trainer.accelerator=gpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_rs_config(config(*overrides, "trainer.accelerator=gpu"))


def test_rows_that_reach_beyond_an_attention_window_need_transformer_engine(files, monkeypatch):
    longest = config().model.data.seq_length
    message = refusal(f"+model.window_size=[{longest - 2},0]")
    assert message == (
        f"model.window_size=[{longest - 2}, 0] needs Transformer Engine (model.transformer_engine=True, on a GPU); "
        f"without it lower model.data.seq_length={longest} to {longest - 1}, which fits in"
    )
    for window in (f"[{longest - 1},0]", "[-1,0]", "null"):
        check_rs_config(config(f"+model.window_size={window}"))
    assert refusal("+model.window_size=3").startswith("model.window_size=3 must be null, or how many")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_rs_config(config("+model.window_size=[3,0]", "+model.transformer_engine=True", "trainer.accelerator=gpu"))


def test_keys_of_the_model_that_look_like_slips_of_the_pen(monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    stored = OmegaConf.create({"hidden_size": 8, "bias_gelu_fusion": True, "decoder_seq_length": 8, "data": {}})
    for name in ("gpt_rs_actor", "quickstart"):
        warn_of_misspelt_keys(OmegaConf.load(CONFIGS / f"{name}.yaml").get("model", {}), stored)
    warn_of_misspelt_keys(
        OmegaConf.load(Path(__file__).parents[1] / "distributed/drop_in/gpt_rs_actor.yaml").model, stored
    )
    assert warnings == []
    slips = {
        "micro_batchsize": 1, "tensor_model_paralel_size": 2, "hiden_size": 4, "decoder_seq_length": 4,
        "data": {"seqlength": 3}, "peft": {"peft_schem": "lora"}, "optim": {"weigth_decay": 0.1},
    }  # fmt: skip
    warn_of_misspelt_keys(OmegaConf.create(slips), stored)
    assert [line.partition("model.")[2] for line in warnings] == [
        "micro_batchsize is not a known key; did you mean model.micro_batch_size?",
        "tensor_model_paralel_size is not a known key; did you mean model.tensor_model_parallel_size?",
        "hiden_size is not a known key; did you mean model.hidden_size?",
        "data.seqlength is not a known key; did you mean model.data.seq_length?",
        "optim.weigth_decay is not a known key; did you mean model.optim.weight_decay?",
        "peft.peft_schem is not a known key; did you mean model.peft.peft_scheme?",
    ]


def test_a_section_that_looks_like_a_slip_of_the_pen(files):
    check_rs_config(config("+remote_rm_2={reward_model: {name: other}}"))  # a second server alongside remote_rm
    message = refusal("~remote_rm", "+remote_rmm={reward_model: {name: other}}")
    assert message == "remote_rmm is not a known section; did you mean remote_rm?"


def test_a_mixture_of_experts_needs_transformer_engine(files, monkeypatch):
    assert refusal("+model.num_moe_experts=8").startswith("model.num_moe_experts=8: a mixture of experts needs")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_rs_config(config("+model.num_moe_experts=8", "+model.transformer_engine=True", "trainer.accelerator=gpu"))


def test_a_gpu_configuration_without_a_gpu(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = refusal("trainer.accelerator=gpu")
    assert message == "trainer.accelerator=gpu, but this machine has no GPU; set trainer.accelerator=cpu to use it"


# ---- warnings


def test_settings_without_effect_are_mentioned(files, warnings):
    check_rs_config(config())
    assert warnings == []
    check_rs_config(config("trainer.max_time=00:01:00:00", "model.rs.sampling_params.compute_logprob=True"))
    assert warnings == [
        "trainer.max_time=00:01:00:00 has no effect in rejection sampling",
        "model.rs.sampling_params.compute_logprob=True has no effect in rejection sampling",
    ]


@pytest.mark.parametrize(("key", "limit"), [("max_epochs", 1), ("max_steps", -1)])
def test_a_limit_of_the_learning_rates_alone_is_mentioned(files, warnings, key, limit):
    check_rs_config(config(f"trainer.{key}=7"))
    assert warnings == [
        f"trainer.{key}=7 sets the length of the learning-rate schedule alone; the run ends by trainer.rs.{key}={limit}"
    ]
