"""Marker and error for rows whose logits are NaN or infinite."""

# Sampled instead of a token where the largest logit is NaN or infinite.
INVALID_TOKEN = -1


class InvalidLogitsError(ArithmeticError):
    """A row's next token could not be sampled, as its logits are NaN or infinite.

    Attributes:
        prompt: the row's prompt, as token ids.
        num_generated: number of tokens it had generated before.
    """

    def __init__(self, prompt: list[int], num_generated: int):
        super().__init__(f"no finite logits behind {num_generated} generated tokens; prompt {prompt}")
        self.prompt, self.num_generated = prompt, num_generated
