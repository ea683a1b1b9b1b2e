"""Ids of special tokens that take the blanks beside them along (`lstrip`, `rstrip`), as those of Phi-3 do.

NeMo 2.0.0's wrapper of a Hugging Face tokenizer makes text into tokens and looks up the id of each. A fast tokenizer
(4.49 at least) gives such a token with its blanks, and as that it is not in the vocabulary: its id becomes the unknown
token's, or None where there is none, at which `ids_to_text` fails. Removal: with a NeMo whose wrapper asks for ids.
"""


def apply() -> None:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    AutoTokenizer.text_to_ids = _text_to_ids


def _text_to_ids(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False)
