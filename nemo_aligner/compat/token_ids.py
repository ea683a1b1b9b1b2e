"""Encoding and decoding with NeMo 2.0.0's wrapper of a Hugging Face tokenizer.

The wrapper splits text into tokens and looks up the id of each. For special tokens that strip adjacent blanks
(`lstrip`, `rstrip`), as those of Phi-3 do, a fast tokenizer (4.49 at least) returns the token with these blanks, which
is not in the vocabulary: its id becomes the unknown token's, or None if there is none, and `ids_to_text` fails.

In decoding, it requests the list of special tokens, which transformers rebuilds each time, once per token of a text:
four fifths of the time to decode a response, during which the interpreter does nothing else.

Removal: with a NeMo whose wrapper requests ids directly, and special tokens once.
"""


def apply() -> None:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    AutoTokenizer.text_to_ids = _text_to_ids
    AutoTokenizer.ids_to_text = _ids_to_text


def _text_to_ids(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False)


def _ids_to_text(self, ids: list[int]) -> str:
    special = set(self.tokenizer.all_special_tokens)
    return self.tokens_to_text([token for token in self.ids_to_tokens(ids) if token not in special])
