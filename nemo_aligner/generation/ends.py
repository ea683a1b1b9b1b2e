"""End strings: whether text generated token by token ends with one of several strings, checked on the host."""

from collections.abc import Sequence

import torch

from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.text_generation_utils import ends_with_text


def check_end_strings(texts: Sequence[str], tokenizer, key: str) -> None:
    """Reject a bare string, and end strings of several tokens that no text can end with, as one of them is special.

    Raises:
        ConfigError: naming the configuration's `key`, the string and what to write instead.
    """
    if isinstance(texts, str):
        raise ConfigError(f"{key}={texts!r} must be a list of strings")
    for text in texts:
        ids = tokenizer.text_to_ids(text)
        if len(ids) == 1:
            continue
        for token_id, token in zip(ids, tokenizer.ids_to_tokens(ids), strict=True):
            if token.strip() and token in text and not tokenizer.ids_to_text([token_id]):
                raise ConfigError(
                    f"{key}: no response can end with {text!r}, as texts are without special tokens such as {token!r}; "
                    f"write {token!r} alone, which ends a response by itself"
                )


class EndStrings:
    """Strings that end a row as soon as its text ends with one of them, however the text is split into tokens.

    Detokenizing at every token would be too slow, so whether the newest token alone can complete a string is checked
    first, and cached per token.
    """

    def __init__(self, texts: list[str], tokenizer):
        self._texts, self._tokenizer = texts, tokenizer
        self._last_characters = {text[-1] for text in texts}
        self._may_complete: dict[int, bool] = {}

    def are_completed_by(self, prompt: list[int], generated: list[int]) -> bool:
        """Whether the row's text ends with one of the strings after the last of the `generated` tokens."""
        if not self._texts or not self._can_complete(generated[-1]):
            return False
        tokens = torch.tensor(prompt + generated)
        return any(ends_with_text(tokens, text, self._tokenizer) for text in self._texts)

    def _can_complete(self, token: int) -> bool:
        """False only if the token's own text certainly ends with another character than all of the strings."""
        if token not in self._may_complete:
            text = self._tokenizer.ids_to_text([token])
            # blank, or part of a character: its effect on the text depends on its neighbours
            is_uncertain = not text.strip() or "\ufffd" in text
            self._may_complete[token] = is_uncertain or text[-1] in self._last_characters
        return self._may_complete[token]
