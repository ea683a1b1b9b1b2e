"""Hugging Face tokenizers inside `.nemo` archives, and loading a tokenizer without its model.

NeMo's `huggingface` tokenizer stores a name or path, which an archive from another machine cannot resolve. Here the
config lists the tokenizer's own files (`tokenizer.files`, name -> path), each registered as an artifact of the archive.
"""

import shutil
import tempfile
from pathlib import Path

from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer
from omegaconf import DictConfig, OmegaConf

from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.nemo_archive import CONFIG_FILE, opened

# config key -> the file name that transformers expects
FILES = {"tokenizer_json": "tokenizer.json", "tokenizer_config_json": "tokenizer_config.json"}
MEMBER = "nemo:"  # prefix in a config for the name of a file in its own archive


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
    return _from_packed_files(paths)


def _from_packed_files(paths: dict[str, str | Path]):
    with tempfile.TemporaryDirectory() as folder:
        for key, name in FILES.items():
            shutil.copy(paths[key], Path(folder, name))
        return _from_hf_folder(folder)


def _from_hf_folder(folder: str | Path):
    return get_nmt_tokenizer(library="huggingface", model_name=str(folder), use_fast=True)


def load_tokenizer(path: str | Path | None):
    """A policy's tokenizer without the policy, in NeMo's wrapper (`eos_id`, `vocab_size`, `ids_to_text`, ...).

    Args:
        path: a `.nemo` archive, or the folder it was extracted to, of which only the config and the tokenizer's files
            are read; or a Hugging Face folder.

    Raises:
        ConfigError: one line naming `tokenizer` and the path, if there is no tokenizer there or it has no end token, or
            the archive is not one that a policy could be restored from.
    """
    if path is None:
        raise ConfigError("tokenizer is not set; give the policy's .nemo file, or a folder with its tokenizer")
    path = Path(path).expanduser()
    if not path.exists():
        raise ConfigError(f"tokenizer: {path} does not exist; give a .nemo file or a folder with a tokenizer")
    if path.is_dir() and not (path / CONFIG_FILE).exists():
        tokenizer = _load_hf_folder(path)
    else:
        tokenizer = _load_from_archive(path)
    if getattr(tokenizer, "eos_id", None) is None:
        raise ConfigError(f"tokenizer: the tokenizer in {path} has no end token; set eos_token in its config")
    return tokenizer


def _load_hf_folder(folder: Path):
    try:
        return _from_hf_folder(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer: {folder} holds no tokenizer that transformers can load") from error


def _load_from_archive(path: Path):
    with opened(path, key="tokenizer", only={CONFIG_FILE}) as archive:
        cfg = archive.config().tokenizer
    if cfg.get("files"):
        members = {key: str(cfg.files.get(key)).removeprefix(MEMBER) for key in FILES}
    elif cfg.library == "sentencepiece" and str(cfg.get("model")).startswith(MEMBER):
        members = {"model": cfg.model.removeprefix(MEMBER)}
    else:
        raise ConfigError(
            f"tokenizer: {path} does not hold its tokenizer (library {cfg.library}); give the Hugging Face folder that "
            "it came from"
        )
    for key, name in members.items():
        if name not in archive.names:
            raise ConfigError(f"{archive.where} lacks its tokenizer's {key} ({name}); convert the model again")
    with opened(path, key="tokenizer", only=set(members.values())) as archive:
        paths = {key: archive.folder / name for key, name in members.items()}
        return _from_packed_files(paths) if cfg.get("files") else _from_sentencepiece(cfg, paths["model"])


def _from_sentencepiece(cfg: DictConfig, model: Path):
    """Built as NeMo does for a GPT model."""
    tokenizer = get_nmt_tokenizer(
        library="sentencepiece", tokenizer_model=str(model), legacy=cfg.get("sentencepiece_legacy", True)
    )
    if cfg.get("additional_special_tokens") is not None:
        tokenizer.add_special_tokens(OmegaConf.to_object(cfg.additional_special_tokens))
    return tokenizer
