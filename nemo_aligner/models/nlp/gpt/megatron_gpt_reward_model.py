"""Reward models as NeMo models: restored from an archive, run for inference over tensor and pipeline parallel ranks.

Symbols: B rows, S padded token width, A attributes that the head scores.
"""

from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.utils_funcs import torch_dtype_from_precision
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.trainer.trainer import Trainer

from nemo_aligner import compat
from nemo_aligner.compat.device import current_device
from nemo_aligner.models.alignable_interface import Inferrable, SupervisedInterface
from nemo_aligner.models.nlp.gpt.gpt_reward_model import GPTRewardModel
from nemo_aligner.models.nlp.gpt.hf_tokenizer import build_packed_tokenizer
from nemo_aligner.models.nlp.gpt.inference_mode import InferenceMode, fill_missing_keys
from nemo_aligner.utils.distributed import broadcast_tensor_within_pp
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.masks import attention_mask_and_position_ids
from nemo_aligner.utils.text_generation_utils import tokenize_batch

compat.apply()


class MegatronGPTRewardModel(MegatronGPTModel, SupervisedInterface, Inferrable):
    """A Megatron GPT model with a scalar head, for inference only. `cfg` is the `model` section.

    Raises:
        ConfigError: for settings that a reward model does not support.

    Attributes:
        enable_standardization, rew_mean, rew_std: whether rewards become (r - mean) / std, with this mean and std.
        forward_micro_batch_size: rows per forward pass.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer):
        _check_config(cfg)
        fill_missing_keys(cfg)
        super().__init__(cfg, trainer=trainer)
        standardization = cfg.get("reward_standardization") or {}
        self.enable_standardization = standardization.get("enable", False)
        self.rew_mean = standardization.get("mean")
        self.rew_std = standardization.get("std")
        self.forward_micro_batch_size = cfg.get("forward_micro_batch_size", cfg.micro_batch_size)
        self.resets = {
            key: cfg.get("data", {}).get(key, False) for key in ("reset_position_ids", "reset_attention_mask")
        }
        self._inference_mode = InferenceMode(self)
        # megatron_amp_O2 has cast the whole model; weights are loaded after this, in full precision.
        for module in self.get_model_module_list():
            if module.post_process:
                module.rm_head.keep_dtype()

    def _build_tokenizer(self):
        if self.cfg.tokenizer.get("files") is None:
            super()._build_tokenizer()
        else:
            self.tokenizer = build_packed_tokenizer(self)

    def model_provider_func(self, pre_process: bool, post_process: bool) -> GPTRewardModel:
        """Build this pipeline stage."""
        regression = self.cfg.get("regression") or {}
        head_dtype = self.cfg.get("force_head_dtype", torch.float32)
        model = GPTRewardModel(
            self.transformer_config,
            head_options={
                "num_attributes": regression.get("num_attributes", 1),
                "dtype": _as_dtype(head_dtype),
                "output_sequence": self.cfg.get("output_sequence", False),
                "use_avg_pool": self.cfg.get("use_avg_pool", False),
                "merge_attributes": regression.get("merge_attributes", False),
                "attribute_weights": regression.get("attribute_weights"),
            },
            # looked up at call time: nemo_aligner.compat may have replaced it
            transformer_layer_spec=megatron_gpt_model.get_specs(
                self.spec_name, self.transformer_config, self.transformer_engine, self.cfg.get("hyena")
            ),
            vocab_size=self.cfg.get("override_vocab_size", self.padded_vocab_size),
            max_sequence_length=self.cfg.get("encoder_seq_length", 512),
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type=self.cfg.get("position_embedding_type", "learned_absolute"),
            rotary_percent=self.cfg.get("rotary_percentage", 1.0),
            seq_len_interpolation_factor=self.cfg.get("seq_len_interpolation_factor"),
            rotary_base=self.cfg.get("rotary_base", 10000),
        )
        megatron_gpt_model.mcore_model_customize(self.cfg, model)
        return model

    @torch.no_grad()
    def infer(
        self,
        inputs: tuple[torch.Tensor, torch.Tensor] | list[str],
        add_BOS: bool = False,
        add_EOS: bool = False,
    ) -> torch.Tensor:
        """Score B rows. All ranks of a replica call it together with the same inputs.

        Args:
            inputs: tokens [B, S] int64, right-padded, and lengths [B] int64, on any device; or B strings, which are
                tokenised to the model's context, with the special tokens that the other arguments ask for.

        Returns:
            float32 [B, A], A = 1 for a plain reward model, on every rank of the replica.

        Raises:
            NotImplementedError: inputs of another kind.
            ValueError: B is not a multiple of the rows of one forward pass, min(B, `forward_micro_batch_size`).
        """
        tokens, lengths = self._tokens_and_lengths(inputs, add_BOS, add_EOS)
        num_rows, width = tokens.shape
        micro_batch_size = min(num_rows, self.forward_micro_batch_size)
        if num_rows % micro_batch_size:
            raise ValueError(
                f"{num_rows} rows cannot be split into forward passes of model.forward_micro_batch_size="
                f"{self.forward_micro_batch_size} rows"
            )
        num_microbatches = num_rows // micro_batch_size
        microbatches = zip(tokens.chunk(num_microbatches), lengths.chunk(num_microbatches), strict=True)
        outputs = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=microbatches,
            model=self.model,
            num_microbatches=num_microbatches,
            forward_only=True,
            seq_length=width,
            micro_batch_size=micro_batch_size,
            collect_non_loss_data=True,
        )
        rewards = None
        if parallel_state.is_pipeline_last_stage():
            rewards = torch.cat(outputs).float()
            if self.enable_standardization:
                rewards = (rewards - self.rew_mean) / self.rew_std
        return broadcast_tensor_within_pp(rewards, dtype=torch.float32)

    def _tokens_and_lengths(self, inputs, add_BOS: bool, add_EOS: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(inputs, (tuple, list)) and len(inputs) > 0:
            if all(isinstance(sentence, str) for sentence in inputs):
                return tokenize_batch(list(inputs), self.tokenizer, self.cfg.encoder_seq_length, add_BOS, add_EOS)
            if len(inputs) == 2 and all(isinstance(tensor, torch.Tensor) for tensor in inputs):
                tokens, lengths = inputs
                return tokens.to(current_device()), lengths.to(current_device())
        raise NotImplementedError(f"infer takes (tokens, lengths) or a list of strings, not {type(inputs).__name__}")

    def _forward_step(self, data_iterator: Iterator, model) -> tuple[torch.Tensor, Callable]:
        tokens, lengths = next(data_iterator)
        attention_mask, position_ids = attention_mask_and_position_ids(tokens, self.tokenizer.eos_id, **self.resets)
        output = model(tokens, lengths, position_ids, attention_mask)
        if not parallel_state.is_pipeline_last_stage():
            output = output.to(self.model_parallel_config.pipeline_dtype)
        return output, lambda rewards, non_loss_data: rewards

    def prepare_for_inference(self) -> None:
        """Switch off what only training needs. A second call before `finish_inference` changes nothing."""
        self._inference_mode.enter()

    def finish_inference(self) -> None:
        """Restore what `prepare_for_inference` switched off."""
        self._inference_mode.leave()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Load the weights of an archive, possibly a base model's: without a reward head, with an output layer.

        Raises:
            ValueError: another parameter is missing.
        """
        state_dict = checkpoint.get("state_dict")
        if not state_dict:
            checkpoint["state_dict"] = {}  # loaded later, see NLPModel.on_load_checkpoint
            return
        (module,) = self.get_model_module_list()
        state_dict = {key.removeprefix("model."): value for key, value in state_dict.items()}
        missing, unexpected = module.load_state_dict(state_dict, strict=False)
        missing = [key for key in missing if not key.endswith("_extra_state")]
        lost = [key for key in missing if not key.startswith("rm_head.")]
        if lost:
            raise ValueError(f"the checkpoint lacks {len(lost)} parameters of the reward model, among them {lost[0]}")
        if missing:
            logging.warning("the checkpoint has no reward head: the head keeps its random initial weights")
        if unexpected:
            logging.warning(
                f"the reward model has no use for {len(unexpected)} entries of the checkpoint: {unexpected}"
            )

    def get_loss_and_metrics(self, batch: dict, forward_only: bool):
        """Reward models are trained elsewhere."""
        raise NotImplementedError("this library runs reward models for inference only")

    def prepare_for_training_step(self) -> None:
        """Reward models are trained elsewhere."""
        raise NotImplementedError("this library runs reward models for inference only")

    def finish_training_step(self) -> None:
        """Reward models are trained elsewhere."""
        raise NotImplementedError("this library runs reward models for inference only")


class MegatronGPTRegressionRewardModel(MegatronGPTRewardModel):
    """A reward model that was trained to predict several attributes."""

    def __init__(self, cfg: DictConfig, trainer: Trainer):
        if OmegaConf.select(cfg, "reward_standardization.enable", default=False):
            raise NotImplementedError(
                "model.reward_standardization.enable: a regression reward model cannot be standardised; set it to False"
            )
        super().__init__(cfg, trainer)


def _check_config(cfg: DictConfig) -> None:
    """Reject settings that a reward model does not support, before anything is built."""
    if not cfg.get("mcore_gpt", False):
        raise ConfigError("model.mcore_gpt: a reward model needs megatron-core's GPT model; set it to True")
    if cfg.get("virtual_pipeline_model_parallel_size") is not None:
        raise ConfigError(
            "model.virtual_pipeline_model_parallel_size: a reward model does not support it; set it to null"
        )
    if cfg.get("sequence_parallel", False):
        raise ConfigError("model.sequence_parallel: a reward model does not support it; set it to False")
    if (cfg.get("context_parallel_size") or 1) > 1:
        raise ConfigError("model.context_parallel_size: a reward model does not support it; set it to 1")
    standardization = cfg.get("reward_standardization") or {}
    if standardization.get("enable", False):
        mean, std = standardization.get("mean"), standardization.get("std")
        if mean is None or std is None or not std > 0:
            raise ConfigError(
                f"model.reward_standardization: mean={mean}, std={std}; give a mean, and a std above 0, or disable it"
            )


def _as_dtype(spelling) -> torch.dtype | None:
    """The dtype for any spelling of a precision; dtypes and None are returned unchanged."""
    if spelling is None or isinstance(spelling, torch.dtype):
        return spelling
    named = getattr(torch, str(spelling).removeprefix("torch."), None)
    return named if isinstance(named, torch.dtype) else torch_dtype_from_precision(spelling)
