"""Every public name of the contract can be imported from its promised module and has the promised signature."""

import importlib
import inspect

import pytest
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin

import nemo_aligner
from nemo_aligner import package_info
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface, Inferrable, SupervisedInterface

PACKAGE_INFO = (
    "__version__ __shortversion__ __package_name__ __description__ __license__ __homepage__ __repository_url__ "
    "__download_url__ __contact_names__ __contact_emails__ __keywords__"
)
NAMES = {
    "nemo_aligner": PACKAGE_INFO,
    "nemo_aligner.package_info": PACKAGE_INFO,
    "nemo_aligner.algorithms.rs": "RSTrainer compute_num_rollout_microbatches",
    "nemo_aligner.algorithms.reward_server": "RewardModelServer ENDPOINT_BIND_ADDRESS MAX_BATCH",
    "nemo_aligner.models.alignable_interface": "SupervisedInterface Inferrable AlignableGenerativeInterface",
    "nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor": "MegatronGPTRSModel",
    "nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model": "MegatronGPTRewardModel",
    "nemo_aligner.models.nlp.gpt.gpt_reward_model": "GPTRewardModel RewardModelHead",
    "nemo_aligner.models.nlp.gpt.reward_model_classes": "RewardModelType REWARD_MODEL_CLASS_DICT",
    "nemo_aligner.models.nlp.gpt.reward_critic_clients": "RemoteGPTRMClient RMFutureResult get_future_result",
    "nemo_aligner.servers.constants": "ServerSignal",
    "nemo_aligner.servers.http_communicator": "HTTPCommunicator",
    "nemo_aligner.data.nlp.builders": (
        "build_train_valid_test_rlhf_datasets build_train_valid_test_datasets build_dataset_generic "
        "collate_with_pad_to_max_batch identity_collate build_dataloader"
    ),
    "nemo_aligner.data.nlp.datasets": "RLHFDataset",
    "nemo_aligner.utils.distributed": (
        "from_parallel_logits_to_logprobs DistributedLogprob calculate_distributed_entropy masked_global_mean_var "
        "normalize_tensor broadcast_tensor broadcast_tensor_within_pp broadcast_2d_tensor "
        "broadcast_2d_tensor_within_pp broadcast_2d_tensor_within_mp rebalance_nd_tensor run_if_model_parallel_src "
        "run_distributed_inference pad_list pad_tensors_to_max_global_seq_len SyncTimer ScopedTimer Timer"
    ),
    "nemo_aligner.utils.ppo_utils": "create_mask select_topk calculate_entropy",
    "nemo_aligner.utils.text_generation_utils": (
        "TrackLengthGPTModelTextGenerationStrategy tokenize_batch verify_is_valid_and_clamp_range_"
    ),
    "nemo_aligner.utils.train_utils": (
        "set_sync_funcs prepare_for_training_step grad_reductions clip_gradients set_train set_eval "
        "prepare_for_validation_step finish_validation_step"
    ),
    "nemo_aligner.utils.trainer_utils": (
        "compute_num_steps_per_epoch compute_limit_batches check_progress safe_is_divisible"
    ),
    "nemo_aligner.utils.train_script_utils": (
        "resolve_and_create_trainer temp_pop_from_config init_distributed init_peft init_using_ptl "
        "disable_data_callbacks retrieve_custom_trainer_state_dict extract_optimizer_scheduler_from_ptl_model "
        "add_custom_checkpoint_callback CustomLoggerWrapper FakeScheduler FakeCheckpointCallback"
    ),
    "nemo_aligner.utils.utils": (
        "load_from_nemo load_checkpoint_model_config load_and_override_model_config remove_overwritten_fields "
        "CustomSaveRestoreConnector custom_save_ckpt_func extract_value_from_ckpt masked_mean masked_std "
        "select_log_probs calculate_response_lengths batch_pad_to_fixed_len collate_with_batch_max_sequence_length "
        "configure_batch_sizes set_autocast_gpu_dtype offload_distributed_adam "
        "dist_adam_load_state_bucket_into_device cpu_dict cuda_dict apply_func_to_dict move_to_device_if_tensor "
        "clear_memory surpress_user_warnings deprecated_in_version"
    ),
    "nemo_aligner.utils.server_utils": (
        "FutureResult lock_method decode_bytes_ndarray pad_input process_inputs "
        "calculate_inference_batch_padding_multiple pad_batch_and_strip_sequence"
    ),
    "nemo_aligner.utils.parallel_state": "get_model_parallel_src_rank get_data_parallel_world_size is_initialized",
    "nemo_aligner.testing.utils": "Utils",
    # what the scripts import from other packages
    "megatron.core": "parallel_state",
    "megatron.core.utils": "divide",
    "nemo.core.config": "hydra_runner",
    "nemo.utils": "logging",
    "nemo.utils.exp_manager": "exp_manager",
    "pytorch_lightning.trainer.trainer": "Trainer",
    "nemo.collections.nlp.parts.nlp_overrides": "NLPDDPStrategy",
}

# Parameters in order, with "=" and the default where there is one. What this library adds must be optional.
SIGNATURES = {
    "algorithms.rs.RSTrainer": (
        "cfg, model, optimizer, scheduler, train_dataloader, val_dataloader, logger, ckpt_callback, run_timer, "
        "num_rollouts_per_prompt, top_n_rollouts, rm"
    ),
    "algorithms.rs.RSTrainer.generate_rollouts": "self, dataloader_iter, num_microbatches",
    "algorithms.rs.RSTrainer.run_training": "self, dataloader_iter",
    "algorithms.rs.RSTrainer.save": "self, extra_candidates=None, is_train_end=False",
    "algorithms.rs.compute_num_rollout_microbatches": "dataloader",
    "algorithms.reward_server.RewardModelServer": (
        "infer_fn, tokenize_func, model_name, port, inference_micro_batch_size, model_forward_micro_batch_size, "
        "strip_sequence_length_to_multiple, max_queue_delay_microseconds=2000"
    ),
    "models.nlp.gpt.megatron_gpt_rs_actor.MegatronGPTRSModel": "cfg, trainer",
    "models.nlp.gpt.megatron_gpt_rs_actor.MegatronGPTRSModel.get_loss_and_metrics": "self, batch, forward_only",
    "models.nlp.gpt.megatron_gpt_rs_actor.MegatronGPTRSModel.infer": "self, inference_batch",
    "models.nlp.gpt.megatron_gpt_rs_actor.MegatronGPTRSModel.get_ltor_masks_and_position_ids": "self, tokens",
    "models.nlp.gpt.megatron_gpt_reward_model.MegatronGPTRewardModel.infer": (
        "self, inputs, add_BOS=False, add_EOS=False"
    ),
    "models.nlp.gpt.reward_critic_clients.RemoteGPTRMClient": "cfg",
    "models.nlp.gpt.reward_critic_clients.RMFutureResult": "rm_future",
    "models.nlp.gpt.reward_critic_clients.get_future_result": "future, keys",
    "servers.http_communicator.HTTPCommunicator": "init_timeout_s=6000",
    "data.nlp.datasets.RLHFDataset": (
        "cfg, tokenizer, name, data_prefix, documents, data, seq_length, seed, drop_last=True"
    ),
    "data.nlp.builders.build_dataset_generic": (
        "cls, cfg, data_prefix, data_impl, num_samples, seq_length, seed, tokenizer, name, n_chunks=None, "
        "n_examples_per_chunk=None"
    ),
    "data.nlp.builders.build_train_valid_test_datasets": (
        "cls, cfg, data_prefix, data_impl, splits_string, train_valid_test_num_samples, seq_length, seed, tokenizer, "
        "n_chunks=None, n_examples_per_chunk=None"
    ),
    "data.nlp.builders.build_dataloader": (
        "cfg, dataset, consumed_samples, mbs, gbs, drop_last=True, pad_samples_to_global_batch_size=False, "
        "collate_fn=None, load_gbs=True, use_random_sampler=True"
    ),
    "utils.distributed.from_parallel_logits_to_logprobs": (
        "vocab_parallel_logits, target, inference_only=False, higher_stability=False, ignore_last=True"
    ),
    "utils.distributed.calculate_distributed_entropy": "vocab_parallel_logits, mask=None",
    "utils.distributed.masked_global_mean_var": "values, mask, group=None",
    "utils.distributed.normalize_tensor": "tensor, mask, group=None",
    "utils.distributed.broadcast_tensor": "tensor, src, group, dtype=None",
    "utils.distributed.broadcast_tensor_within_pp": "tensor, dtype=None, from_last=True",
    "utils.distributed.rebalance_nd_tensor": "tensor, group",
    "utils.distributed.run_distributed_inference": "inputs=None, infer_fn=None",
    "utils.distributed.pad_list": "tensor_list, pad_value",
    "utils.distributed.pad_tensors_to_max_global_seq_len": (
        "list_of_tensors, pad_value, group, sequence_length_to_pad_to=None"
    ),
    "utils.distributed.Timer": "duration",
    "utils.ppo_utils.create_mask": "values, prompt_lengths, response_lengths",
    "utils.ppo_utils.select_topk": "batch, num_select=1",
    "utils.ppo_utils.calculate_entropy": "log_probs, mask=None",
    "utils.text_generation_utils.TrackLengthGPTModelTextGenerationStrategy": "model, context_lengths, max_length",
    "utils.text_generation_utils.tokenize_batch": "sentences, tokenizer, max_len, add_BOS=False, add_EOS=False",
    "utils.text_generation_utils.verify_is_valid_and_clamp_range_": (
        "response_tokens, response_lengths, strategy, tokenizer, end_strings=None"
    ),
    "utils.train_utils.set_sync_funcs": "ptl_model, forward_only",
    "utils.train_utils.prepare_for_training_step": "ptl_model, zero_grad=True",
    "utils.train_utils.clip_gradients": "ptl_model, clip_val",
    "utils.trainer_utils.compute_limit_batches": "number_of_batches, limit_batches",
    "utils.trainer_utils.compute_num_steps_per_epoch": "sampler, limit_train_batches=1.0",
    "utils.trainer_utils.check_progress": (
        "step, max_steps, val_check_interval, save_interval, limit_val_batches, run_time_exceeded=False"
    ),
    "utils.train_script_utils.resolve_and_create_trainer": "cfg, pop_trainer_key",
    "utils.train_script_utils.temp_pop_from_config": "cfg, name_to_temporarily_remove",
    "utils.train_script_utils.init_distributed": "ptl_trainer, ptl_model, use_te=False",
    "utils.train_script_utils.init_peft": "ptl_model, updated_cfg",
    "utils.train_script_utils.init_using_ptl": "ptl_trainer, ptl_model, train_dataloader, train_ds",
    "utils.train_script_utils.CustomLoggerWrapper.log_metrics": "self, metrics, step=None, prefix=''",
    "utils.utils.load_from_nemo": (
        "cls, model_cfg, trainer, strict=True, modify_config_fn=None, restore_path=None, load_base_model_only=False, "
        "return_updated_cfg=False"
    ),
    "utils.utils.load_and_override_model_config": "restore_path, model_cfg_to_overwrite, remove_meta_info=True",
    "utils.utils.extract_value_from_ckpt": "key, ckpt_path",
    "utils.utils.configure_batch_sizes": "mbs, gbs, dp=1",
    "utils.utils.masked_mean": "values, mask, dim=None",
    "utils.utils.offload_distributed_adam": "state_dict, force_clear_memory=False",
    "utils.utils.custom_save_ckpt_func": (
        "self, trainer, pl_module, monitor_candidates, is_train_end=False, save_top_only=False"
    ),
    "utils.server_utils.calculate_inference_batch_padding_multiple": "current_size, model_forward_micro_batch_size",
    "utils.server_utils.pad_batch_and_strip_sequence": (
        "tokens, sequence_lengths, pad_to_multiple, strip_sequence_length_to_multiple=None"
    ),
}


@pytest.mark.parametrize("module", NAMES)
def test_names_can_be_imported(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path):
    parts = path.split(".")
    # the longest prefix that is a module (in lower case); the parts after it are attributes
    split = next(i for i in range(len(parts), 0, -1) if _is_module(parts[:i]))
    found = importlib.import_module(".".join(["nemo_aligner", *parts[:split]]))
    for part in parts[split:]:
        found = getattr(found, part)
    parameters = list(inspect.signature(found).parameters.values())
    promised = parameters[: SIGNATURES[path].count(",") + 1]
    assert ", ".join(map(_name_and_default, promised)) == SIGNATURES[path]
    assert [added.name for added in parameters[len(promised) :] if added.default is added.empty] == []


def _name_and_default(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"


def _is_module(parts: list[str]) -> bool:
    try:
        return importlib.util.find_spec(".".join(["nemo_aligner", *parts])) is not None
    except ModuleNotFoundError:
        return False


def test_the_package_information_is_one():
    for name in PACKAGE_INFO.split():
        assert getattr(nemo_aligner, name) == getattr(package_info, name)
    assert package_info.__version__.startswith(package_info.__shortversion__)


def test_bases_of_the_actor():
    from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel

    assert MegatronGPTRSModel.__bases__ == (NLPAdapterModelMixin, MegatronGPTModel, AlignableGenerativeInterface)
    assert not inspect.isabstract(MegatronGPTRSModel)


def test_bases_of_the_reward_model():
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import MegatronGPTRewardModel

    assert issubclass(MegatronGPTRewardModel, MegatronGPTModel)
    assert issubclass(MegatronGPTRewardModel, SupervisedInterface) and issubclass(MegatronGPTRewardModel, Inferrable)


@pytest.mark.parametrize(
    "interface, abstract",
    [
        (SupervisedInterface, {"get_loss_and_metrics", "prepare_for_training_step", "finish_training_step"}),
        (Inferrable, {"prepare_for_inference", "finish_inference", "infer"}),
        (AlignableGenerativeInterface, {"prepare_for_training", "finish_training"}),
    ],
)
def test_abstract_methods(interface, abstract):
    inherited = set().union(*(base.__abstractmethods__ for base in interface.__bases__ if base.__name__ != "ABC"))
    assert interface.__abstractmethods__ - inherited == abstract


def test_optional_methods_are_refused_unless_overridden():
    class Model(SupervisedInterface):
        get_loss_and_metrics = prepare_for_training_step = finish_training_step = lambda self: None

    for optional in ("prepare_for_validation_step", "finish_validation_step"):
        with pytest.raises(NotImplementedError):
            getattr(Model(), optional)()


def test_constants():
    from nemo_aligner.algorithms.reward_server import ENDPOINT_BIND_ADDRESS, MAX_BATCH
    from nemo_aligner.models.nlp.gpt.reward_model_classes import RewardModelType
    from nemo_aligner.servers.constants import ServerSignal

    assert (ENDPOINT_BIND_ADDRESS, MAX_BATCH) == ("0.0.0.0", 9999999)
    assert {signal.name: signal.value for signal in ServerSignal} == {"FORWARD": 1, "TRAIN": 2, "INVALID": 3, "SAVE": 4}
    assert RewardModelType.BINARY_RANKING.value == "binary_ranking" and RewardModelType.REGRESSION.value == "regression"


def test_parallel_state_falls_through():
    from megatron.core import parallel_state as of_megatron

    from nemo_aligner.utils import parallel_state

    assert parallel_state.get_tensor_model_parallel_rank is of_megatron.get_tensor_model_parallel_rank
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = parallel_state.no_such_name
