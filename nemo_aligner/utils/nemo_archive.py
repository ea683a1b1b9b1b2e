"""Checks of `.nemo` archives (a tar file or the folder it was extracted to) before anything is restored from them."""

import tarfile
from pathlib import Path

from nemo_aligner.utils.errors import ConfigError

CONFIG_FILE = "model_config.yaml"
WEIGHTS = ("model_weights", "model_weights.ckpt", "mp_rank_00", "tp_rank_00_pp_rank_000")


def check_archive(path: str | Path, key: str = "pretrained_checkpoint.restore_from_path") -> None:
    """Refuse what is not a complete `.nemo` archive or extracted folder. Only headers are read.

    Raises:
        ConfigError: naming the config key, the path and what is wrong.
    """
    if path is None:
        raise ConfigError(f"{key} is not set; give the .nemo file, or extracted folder, to start from")
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{key}: {path} does not exist; give a .nemo file or a folder that one was extracted to")
    names = _folder_names(path) if path.is_dir() else _member_names(path, key)
    kind = "folder" if path.is_dir() else "archive"
    if CONFIG_FILE not in names:
        raise ConfigError(f"{key}: the {kind} {path} has no {CONFIG_FILE}, so it is not a .nemo checkpoint")
    if not names & set(WEIGHTS):
        raise ConfigError(f"{key}: the {kind} {path} has no model weights ({' or '.join(WEIGHTS[:2])})")


def _folder_names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def _member_names(path: Path, key: str) -> set[str]:
    """First path components of all members of an archive that has its end, two empty blocks."""
    try:
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            archive.fileobj.seek(archive.offset)
            if len(archive.fileobj.read(2 * tarfile.BLOCKSIZE)) < 2 * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise ConfigError(
            f"{key}: {path} is not a complete .nemo archive ({reason}); it may be truncated: copy or convert it again"
        ) from error
    return {Path(member.name).parts[0] for member in members if Path(member.name).parts}
