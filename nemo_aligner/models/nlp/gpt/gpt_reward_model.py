"""A GPT transformer with a reward head on its last stage instead of an output layer.

Shapes (Megatron puts the sequence first): hidden_SBH, lengths_B, attributes_BA; S positions, B rows, H hidden size, A
attributes that the head scores.
"""

from collections.abc import Sequence

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_aligner.utils.errors import ConfigError


class RewardModelHead(RowParallelLinear):
    """Linear layer from the hidden state of a row to its attributes, split over tensor parallel ranks along H."""

    def __init__(
        self,
        config: TransformerConfig,
        num_attributes: int = 1,
        dtype: torch.dtype | None = torch.float32,
        output_sequence: bool = False,
        use_avg_pool: bool = False,
        merge_attributes: bool = False,
        attribute_weights: Sequence[float] | None = None,
    ):
        """
        Args:
            dtype: dtype of the head's weights and computation; None for the model's.
            output_sequence: score every position.
            use_avg_pool: score the mean hidden state of a row instead of its last one.
            merge_attributes: return one number per row, the sum of the attributes times their weights.
            attribute_weights: one per attribute; None weighs them equally, with a sum of 1.

        Raises:
            ConfigError: there is not one weight per attribute, or both `output_sequence` and `use_avg_pool` are set.
        """
        if output_sequence and use_avg_pool:
            raise ConfigError("model.output_sequence and model.use_avg_pool exclude each other: set one to False")
        weights = [1 / num_attributes] * num_attributes if attribute_weights is None else list(attribute_weights)
        if len(weights) != num_attributes:
            raise ConfigError(
                f"model.regression.attribute_weights has {len(weights)} entries for num_attributes={num_attributes}"
            )
        super().__init__(
            config.hidden_size,
            num_attributes,
            config=config,
            init_method=config.init_method,
            bias=True,
            input_is_parallel=False,
            skip_bias_add=False,
        )
        self.output_sequence = output_sequence
        self.use_avg_pool = use_avg_pool
        self.merge_attributes = merge_attributes
        self.attribute_weights = weights
        self.dtype = dtype or self.weight.dtype
        self.keep_dtype()

    def keep_dtype(self) -> None:
        """Undo a cast of the whole model. Called once after it, before weights are loaded."""
        self.to(self.dtype)

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states: [S, B, H], any dtype; the same on all tensor parallel ranks.
            lengths: [B] int64; positions from a row's length on are padding.

        Returns:
            [B, A], or [B, S, A] with `output_sequence`; A is 1 with `merge_attributes`. In the head's dtype.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            attributes, _ = super().forward(self._pool(hidden_states, lengths))
            if self.merge_attributes:
                attributes = attributes @ attributes.new_tensor(self.attribute_weights).unsqueeze(-1)
        return attributes.transpose(0, 1).contiguous() if self.output_sequence else attributes

    def _pool(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[B, H], or [S, B, H] with `output_sequence`, in the head's dtype."""
        num_positions, num_rows, _ = hidden_states.shape
        if self.output_sequence:
            return hidden_states.to(self.dtype)
        if self.use_avg_pool:
            positions = torch.arange(num_positions, device=hidden_states.device)
            is_content = positions.unsqueeze(-1) < lengths
            total = torch.where(is_content.unsqueeze(-1), hidden_states.to(self.dtype), 0).sum(dim=0)
            return total / lengths.clamp(min=1).unsqueeze(-1)  # the server pads batches with rows of length 0
        rows = torch.arange(num_rows, device=hidden_states.device)
        return hidden_states[lengths - 1, rows].to(self.dtype)


class GPTRewardModel(GPTModel):
    """megatron-core's GPT model with a `RewardModelHead` instead of its output layer."""

    # False leaves the head out of sharded state dicts, so that a base model, which has none, can be loaded.
    return_rm_head_in_state_dict = True

    def __init__(self, config: TransformerConfig, *, head_options: dict, **gpt_options):
        """
        Args:
            head_options: keyword arguments of `RewardModelHead`.
            gpt_options: keyword arguments of `GPTModel`.

        Raises:
            ConfigError: for fp8.
        """
        if config.fp8 is not None:
            raise ConfigError(
                f"model.fp8: a reward model's head cannot be trained or served in {config.fp8}; set it to False"
            )
        super().__init__(config, share_embeddings_and_output_weights=False, **gpt_options)
        if self.post_process:
            del self.output_layer
            self.rm_head = RewardModelHead(config, **head_options)

    def forward(
        self,
        input_ids,
        lengths,
        position_ids,
        attention_mask,
        decoder_input=None,
        labels=None,
        inference_params=None,
    ) -> torch.Tensor:
        """
        Args:
            input_ids, position_ids: [B, S] int64; used on the first pipeline stage.
            lengths: [B] int64; used on the last.
            attention_mask: [B or 1, 1, S, S] bool, True = blocked, or None for causal attention.
            decoder_input: hidden states [S, B, H] to start from instead of `input_ids`.
            labels: must be None: a reward model has no tokens to predict.

        Returns:
            On the last stage the output of `RewardModelHead`, on the others hidden states [S, B, H].
        """
        assert labels is None, "a reward model takes no labels"
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        rotary_pos_emb = None
        if self.position_embedding_type == "rope":
            width = self.rotary_pos_emb.get_rotary_seq_len(inference_params, self.decoder, decoder_input, self.config)
            rotary_pos_emb = self.rotary_pos_emb(width)
        hidden_states = self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            inference_params=inference_params,
            rotary_pos_emb=rotary_pos_emb,
        )
        return self.rm_head(hidden_states, lengths) if self.post_process else hidden_states

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Every parameter under its name in a checkpoint; see `return_rm_head_in_state_dict`."""
        # GPTModel and LanguageModule expect an output layer, which does not exist here.
        state_dict = super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)
        left_out = f"{prefix}rm_head._extra_state" if self.return_rm_head_in_state_dict else f"{prefix}rm_head."
        return {key: value for key, value in state_dict.items() if not key.startswith(left_out)}
