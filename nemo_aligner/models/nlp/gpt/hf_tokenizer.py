"""Hugging Face tokenizers that travel inside a `.nemo` archive.

NeMo's `huggingface` tokenizer stores a name or path, so an archive made elsewhere finds no tokenizer. Here the config
lists the tokenizer's own files (`tokenizer.files`, name -> path), each registered as an artifact of the archive.
"""

import shutil
import tempfile
from pathlib import Path

from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

# config key -> the name under which transformers looks for the file
FILES = {"tokenizer_json": "tokenizer.json", "tokenizer_config_json": "tokenizer_config.json"}


def tokenizer_config(folder: str | Path) -> dict:
    """The `tokenizer` section of a model config for the fast tokenizer that `save_pretrained` wrote to `folder`."""
    files = {key: str(Path(folder, name)) for key, name in FILES.items()}
    return {"library": "huggingface", "type": None, "use_fast": True, "model": None, "vocab_file": None, "files": files}


def build_packed_tokenizer(model):
    """NeMo's wrapper of the tokenizer whose files `model.cfg.tokenizer.files` lists, each registered as an artifact.

    Raises:
        ValueError: if one of the files is missing, naming its config key.
    """
    paths = {}
    for key in FILES:
        registered = model.register_artifact(f"tokenizer.files.{key}", model.cfg.tokenizer.files.get(key))
        if registered is None or not Path(registered).is_file():
            raise ValueError(f"model.tokenizer.files.{key}: no such file: {registered}; convert the model again")
        paths[key] = registered
    with tempfile.TemporaryDirectory() as folder:
        for key, name in FILES.items():
            shutil.copy(paths[key], Path(folder, name))
        return get_nmt_tokenizer(library="huggingface", model_name=folder, use_fast=True)
