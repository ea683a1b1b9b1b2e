"""Safe reading of untrusted `.nemo` archives (a tar file, possibly gzipped, or the folder it was extracted to).

Nothing outside the target folder is written and no code in an archive is run. Members are read sequentially, in
bounded pieces. NeMo's own tar handling is not used.
"""

import contextlib
import gzip
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.utils.errors import ConfigError

CONFIG_FILE = "model_config.yaml"
WEIGHTS = ("model_weights", "model_weights.ckpt", "mp_rank_00", "tp_rank_00_pp_rank_000")
KEY = "pretrained_checkpoint.restore_from_path"

_PIECE = 2**20  # bytes read at a time; also the largest extended header, which tarfile reads in one piece
_LARGEST_CONFIG = 2**20
_DEEPEST_CONFIG = 50
_MOST_MEMBERS = 2**17
_REQUIRED_SIZES = ("num_layers", "hidden_size", "num_attention_heads")
# Tokenizer libraries that NeMo implements, except `tabular`, whose vocabulary is a pickle.
_TOKENIZERS = ("huggingface", "sentencepiece", "megatron", "byte-level", "regex", "tiktoken")
# NeMo and Hydra import and call what the first two name; the third lets transformers run a tokenizer's own code.
_CODE_KEYS = ("_target_", "cls", "trust_remote_code")


def check_archive(path: str | Path, key: str = KEY) -> None:
    """Refuse anything but a complete `.nemo` archive or extracted folder. Reads headers only.

    Raises:
        ConfigError: naming the config key, the path and what is wrong.
    """
    path, where = _existing(path, key)
    _check_complete(_names_in_folder(path, where) if path.is_dir() else _read_archive(path, where), where)


@dataclass
class Checkpoint:
    """An archive: `folder` holds all or some of its members; `names` lists all its files."""

    where: str
    folder: Path
    names: set[str]

    def config(self) -> DictConfig:
        """The stored config. Unknown keys are accepted: configs written by other programs have hundreds.

        Raises:
            ConfigError: naming the key that is missing, wrong or makes NeMo run code that it names, or a missing member
                that a key refers to.
        """
        with naming(self.where):
            config = _read_yaml(self.folder / CONFIG_FILE)
            _check_config(config, self.names)
        return OmegaConf.create(config)


@contextlib.contextmanager
def opened(path: str | Path, key: str = KEY, only: set[str] | None = None) -> Iterator[Checkpoint]:
    """Extract an archive, or only its files in `only`, to a temporary folder that is removed on exit.

    A folder is checked like an archive and used in place.

    Raises:
        ConfigError: as in `check_archive`; or naming the member that is damaged, too large for the disk, neither a
            file nor a folder, or outside the archive.
    """
    path, where = _existing(path, key)
    if path.is_dir():
        names = _names_in_folder(path, where)
        _check_complete(names, where)
        yield Checkpoint(where, path, names)
        return
    with tempfile.TemporaryDirectory(prefix="nemo_archive_") as folder:
        names = _read_archive(path, where, Path(folder), only)
        _check_complete(names, where)
        yield Checkpoint(where, Path(folder), names)


def extract(path: str | Path, folder: str | Path, only: set[str] | None = None) -> None:
    """Extract the files of an archive, or only those in `only`, to `folder`.

    Raises:
        ConfigError: as in `opened`.
    """
    path, where = _existing(path, KEY)
    _read_archive(path, where, Path(folder), None if only is None else {str(PurePosixPath(name)) for name in only})


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Prefix the message of a ConfigError with `where`, a config key and a path."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _existing(path: str | Path | None, key: str) -> tuple[Path, str]:
    """The path, and its description for messages."""
    if path is None:
        raise ConfigError(f"{key} is not set; give the .nemo file, or extracted folder, to start from")
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{key}: {path} does not exist; give a .nemo file or a folder that one was extracted to")
    return path, f"{key}: the folder {path}" if path.is_dir() else f"{key}: the archive {path}"


def _check_complete(names: set[str], where: str) -> None:
    if CONFIG_FILE not in names:
        raise ConfigError(f"{where} has no {CONFIG_FILE}, so it is not a .nemo checkpoint")
    if not {PurePosixPath(name).parts[0] for name in names} & set(WEIGHTS):
        raise ConfigError(f"{where} has no model weights ({' or '.join(WEIGHTS[:2])})")


# ---- folders


def _names_in_folder(path: Path, where: str) -> set[str]:
    """Names of all files and folders in a folder; refuses anything else in it."""
    names = set()
    for parent, folders, files in os.walk(path):
        for name in folders + files:
            entry = Path(parent, name)
            if not stat.S_ISREG(mode := entry.lstat().st_mode) and not stat.S_ISDIR(mode):
                what = "a link; put the file in its place" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                raise ConfigError(f"{where}: {entry.relative_to(path)} is {what}")
            names.add(entry.relative_to(path).as_posix())
    return names


# ---- archives


def _read_archive(path: Path, where: str, folder: Path | None = None, only: set[str] | None = None) -> set[str]:
    """Names of all files and folders in an archive; if `folder` is given, extracts the files, or those in `only`."""
    names = {}
    if folder is not None and only is None:
        _check_space(folder, path.stat().st_size, where, "it")
    try:
        with _open_tar(path) as archive:
            for member in archive:
                with naming(where):
                    name = _checked_name(member, names)
                names[name] = member.isdir()
                if folder is not None and member.isreg() and (only is None or name in only):
                    _check_space(folder, member.size, where, name)
                    _write_member(archive, member, folder / name, where)
            _check_end(archive)
    except ConfigError:
        raise
    # tarfile does not wrap all errors of its parsing
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, LookupError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise ConfigError(
            f"{where} is not a complete .nemo archive ({reason}); it may be truncated: copy or convert it again"
        ) from error
    return set(names) - {"."}


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    with path.open("rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        content = gzip.GzipFile(fileobj=file) if is_gzipped else file
        with tarfile.open(fileobj=_BoundedReads(content), mode="r:") as archive:
            yield archive


class _BoundedReads:
    """A file with bounded reads: tarfile would read an extended header of any declared size at once."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _PIECE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _checked_name(member: tarfile.TarInfo, names: dict) -> str:
    """The name of a member relative to the archive's root, if it is allowed."""
    name = PurePosixPath(member.name)
    shown = ascii(member.name)[1:-1]
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        raise ConfigError(f"the member {shown} would be written outside the target folder; do not use this archive")
    if member.issym() or member.islnk():
        raise ConfigError(f"the member {shown} is a link; archives hold files and folders only")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or member.issparse():
        raise ConfigError(f"the member {shown} is neither a file nor a folder")
    if member.size < 0:
        raise ConfigError(f"the member {shown} has a size of {member.size}")
    if str(name) in names and not (member.isdir() and names[str(name)]):
        raise ConfigError(f"the member {shown} is there twice")
    if str(name) == "." and not member.isdir():
        raise ConfigError("a member has no name")
    if len(names) == _MOST_MEMBERS:
        raise ConfigError(f"it has more than {_MOST_MEMBERS} members")
    return str(name)


def _check_space(folder: Path, size: int, where: str, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ConfigError(
            f"{where}: {what} has {size / 2**30:.1f} GiB, but {tempfile.gettempdir()}, where it is extracted to, "
            f"has {free / 2**30:.1f} GiB left; set the environment variable TMPDIR to a larger disk"
        )


def _write_member(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path, where: str) -> None:
    """Copy a member's content to a new file. The padding of its last block must be zeros, or its size is wrong."""
    source, left = archive.fileobj, member.size
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        output = target.open("xb")
    except OSError as error:
        raise ConfigError(f"{where}: the member {member.name} cannot be written ({error.strerror})") from error
    with output:
        source.seek(member.offset_data)
        while left:
            piece = source.read(min(left, _PIECE))
            if not piece:
                raise tarfile.ReadError(f"unexpected end of data in {member.name}")
            left -= len(piece)
            try:
                output.write(piece)
            except OSError as error:
                raise ConfigError(f"{where}: the member {member.name} cannot be written ({error.strerror})") from error
    if source.read(-member.size % tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"{member.name} goes on after its end")


def _check_end(archive: tarfile.TarFile) -> None:
    """Require at least two empty blocks and nothing else after the last member: tarfile stops at a bad header."""
    archive.fileobj.seek(archive.offset)
    found = 0
    while piece := archive.fileobj.read(_PIECE):
        if piece.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {archive.offset}")
        found += len(piece)
    if found < 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")


# ---- configs


def _read_yaml(path: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ConfigError(f"{path.name} has {path.stat().st_size} bytes, too many for a config")
    try:
        depth = 0
        for event in yaml.parse(path.read_bytes(), yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            # OmegaConf copies what an alias refers to, so a few lines can expand to billions of nodes.
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{path.name} has YAML aliases (*name), which are not supported")
            if depth > _DEEPEST_CONFIG:
                raise ConfigError(f"{path.name} is nested more than {_DEEPEST_CONFIG} levels deep")
        config = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path.name} cannot be read ({reason})") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path.name} holds a {type(config).__name__}, not a mapping")
    return OmegaConf.to_container(config)


def _check_config(config: dict, names: set[str]) -> None:
    """Refuse a config that no model can be built from, or that would run code.

    Raises:
        ConfigError: naming the key, and the member that is missing if it refers to one.
    """
    for size in _REQUIRED_SIZES:
        if type(config.get(size)) is not int or config[size] < 1:
            raise ConfigError(f"{CONFIG_FILE}: {size} is {config.get(size)!r}, not a positive number")
    tokenizer = config.get("tokenizer")
    library = tokenizer.get("library") if isinstance(tokenizer, dict) else None
    if library not in _TOKENIZERS:
        raise ConfigError(f"{CONFIG_FILE}: tokenizer.library is {library!r}; supported are {', '.join(_TOKENIZERS)}")
    if "model" in config:
        raise ConfigError(f"{CONFIG_FILE}: because of its key model, NeMo would build from that section; remove it")
    for key, value in _leaves(config):
        if key.rpartition(".")[2] in _CODE_KEYS and value not in (None, False):
            raise ConfigError(
                f"{CONFIG_FILE}: {key}={value!r} would run code that the archive names; remove it from the archive, "
                "and if the run needs it, set it in the run's own configuration"
            )
        # NeMo stores configs resolved. An interpolation could still resolve to anything, including a `_target_`.
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{CONFIG_FILE}: {key}={value!r} is an interpolation; put the value itself there")
        if isinstance(value, str) and value.startswith("nemo:") and (name := value.removeprefix("nemo:")) not in names:
            raise ConfigError(f"the member {name} is missing, to which {CONFIG_FILE} refers as {key}")


def _leaves(tree, key: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key and value of every leaf of nested dictionaries and lists."""
    if not isinstance(tree, (dict, list)) or not tree:
        yield key, tree
        return
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _leaves(value, f"{key}.{name}" if key else str(name))
