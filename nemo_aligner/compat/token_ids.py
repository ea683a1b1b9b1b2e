"""Ids of a text and the text of ids, by NeMo 2.0.0's wrapper of a Hugging Face tokenizer.

It makes text into tokens and looks up the id of each. Special tokens that take the blanks beside them along (`lstrip`,
`rstrip`), as those of Phi-3 do, a fast tokenizer (4.49 at least) gives with these blanks, and as that they are not in
the vocabulary: their ids become the unknown token's, or None where there is none, at which `ids_to_text` fails.

And it asks for the list of special tokens, which transformers puts together each time, once for each token of a text:
four fifths of the time that a response takes to become a text, in which the interpreter does nothing else.

Removal: with a NeMo whose wrapper asks for ids, and for special tokens once.
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
