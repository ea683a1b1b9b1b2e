"""Whether a text that was generated token by token ends with one of several strings, found on the host."""

from collections.abc import Sequence

import torch

from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.text_generation_utils import ends_with_text


def check_end_strings(texts: Sequence[str], tokenizer, key: str) -> None:
    """Refuse what is no list, and a string of several tokens that no text can end with, as one of them is special.

    Raises:
        ConfigError: naming `key` of the configuration, the string and what to write instead.
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
    """Strings that end a row as soon as its text ends with one of them, however their tokens are cut.

    Decoding text costs more than a token may: so first the newest token alone is asked whether it can be the last of a
    string, and its answer is kept.
    """

    def __init__(self, texts: list[str], tokenizer):
        self._texts, self._tokenizer = texts, tokenizer
        self._last_characters = {text[-1] for text in texts}
        self._may_complete: dict[int, bool] = {}

    def are_completed_by(self, prompt: list[int], generated: list[int]) -> bool:
        """Whether the last of the `generated` tokens brings the row's text to the end of a string."""
        if not self._texts or not self._can_complete(generated[-1]):
            return False
        tokens = torch.tensor(prompt + generated)
        return any(ends_with_text(tokens, text, self._tokenizer) for text in self._texts)

    def _can_complete(self, token: int) -> bool:
        """True unless the token's own text is certain to leave another last character."""
        if token not in self._may_complete:
            text = self._tokenizer.ids_to_text([token])
            # nothing, or part of a character: what it does to the text shows in its surroundings only
            is_uncertain = not text.strip() or "\ufffd" in text
            self._may_complete[token] = is_uncertain or text[-1] in self._last_characters
        return self._may_complete[token]
