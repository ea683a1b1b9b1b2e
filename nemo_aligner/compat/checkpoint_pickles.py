"""Reads the pickles in a checkpoint without running code from them.

torch (up to 2.13 at least) reads the `.metadata` of a distributed checkpoint with `pickle.load` and its objects with
`weights_only=False`; megatron-core 0.9 and NeMo 2.0 leave `weights_only` to torch, whose default was False before 2.6;
Transformer Engine unpickles the states that it stores as bytes. Each of these can run arbitrary code from the file. So
every pickle of an archive is first read here, into inert records, and refused if it names anything but the classes that
such files need. Removal: when all of them load with `weights_only=True` and `.metadata` is no longer a pickle.
"""

import collections
import io
import pickle
import reprlib
import struct
from collections.abc import Iterator
from typing import BinaryIO, ClassVar

import torch

# Classes and functions that may be called. None of them does more than store its arguments.
_CALLED = {
    "_io": {"BytesIO"},
    "pathlib": {"PosixPath"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "transformer_engine.common.recipe": {"DelayedScaling", "Format", "_FormatHelper"},
}  # fmt: skip
# Names that may be referenced but not called: calling a storage could allocate any size.
_MENTIONED = {"torch.storage.UntypedStorage", "torch.storage.TypedStorage"}
_MENTIONED |= {
    f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype) or name.endswith("Storage")
}
_ZIP = b"PK\x03\x04"


class PickleRefused(Exception):
    """A pickle must not, or cannot, be loaded; the message says why."""


class Record:
    """An object as described by a pickle: the name of its class, its constructor arguments and its state."""

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state) -> None:
        if self.args or self.state is not None:  # the result would depend on the real class
            raise PickleRefused(f"it is damaged: {type(self).__name__} is given its state twice")
        self.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}{reprlib.repr(self.args or self.state)}"


def _latin1(text: str, encoding: str) -> bytes:
    """Protocol 2 writes bytes as text in latin-1."""
    if encoding != "latin1":
        raise PickleRefused(f"it wants to encode text in {encoding!r}, which no weights need; it was not loaded")
    return text.encode(encoding)


# `bytes` could be made to allocate any size; legitimate pickles only create empty ones.
_REPLACED = {
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _latin1,
    "builtins.bytes": lambda: b"",
}


class _InertUnpickler(pickle._Unpickler):
    """Derived from the pure-Python unpickler, because the C one allocates memo slots for any index in a file."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        self.size = len(content)
        self.classes = {}

    def find_class(self, module: str, name: str):
        module = "builtins" if module == "__builtin__" else module  # its name in protocol 2
        if f"{module}.{name}" in _MENTIONED:
            return f"{module}.{name}"
        if f"{module}.{name}" in _REPLACED:
            return _REPLACED[f"{module}.{name}"]
        if name in _CALLED.get(module, ()):
            return self.classes.setdefault((module, name), type(name, (Record,), {}))
        raise PickleRefused(f"it wants to use {module}.{name}, which no weights need; it was not loaded")

    def persistent_load(self, pid):
        return pid

    def get_extension(self, code: int):
        raise PickleRefused(f"it wants to use the extension {code}, which no weights need; it was not loaded")

    def load_long_binput(self) -> None:
        (index,) = struct.unpack("<I", self.read(4))
        if index > self.size:
            raise PickleRefused(f"it is damaged: memo index {index} in {self.size} bytes")
        self.memo[index] = self.stack[-1]

    dispatch[pickle.LONG_BINPUT[0]] = load_long_binput


def read_pickle(content: bytes):
    """The object that `content` describes, with a `Record` for every instance of an allowed class.

    Raises:
        PickleRefused: if the pickle names anything else, or is damaged.
    """
    try:
        return _InertUnpickler(content).load()
    except PickleRefused:
        raise
    except Exception as error:  # damaged files can raise anything
        raise PickleRefused(f"it is damaged ({type(error).__name__}: {error})") from error


def read_torch_file(file: BinaryIO):
    """The contents of a `torch.save` file, with tensors as the `Record` of their rebuild call. Reads no tensor data.

    Raises:
        PickleRefused: as in `read_pickle`.
    """
    return _read_records(file)[0]


def check_object(content: bytes) -> None:
    """Refuse the `torch.save` file of a sharded object if a pickle in it must not be loaded.

    Transformer Engine nests its own torch files and pickles in it, as a BytesIO or a byte tensor.

    Raises:
        PickleRefused: as in `read_pickle`.
    """
    saved, reader = _read_records(io.BytesIO(content))
    for record in _records_in(saved):
        if type(record).__name__ == "BytesIO" and (nested := _bytes_of(record)):
            check_object(nested)
        elif type(record).__name__.startswith("_rebuild_tensor") and (nested := _bytes_in_tensor(record, reader)):
            read_pickle(nested)


def _read_records(file: BinaryIO) -> tuple:
    """The object in a `torch.save` file, and torch's reader of it: other zip readers may parse the file differently."""
    if file.read(len(_ZIP)) != _ZIP:
        raise PickleRefused("it is not a file that torch.save wrote (in its format since torch 1.6)")
    file.seek(0)
    try:
        reader = torch._C.PyTorchFileReader(file)
        if "constants.pkl" in reader.get_all_records():
            raise PickleRefused("it is TorchScript, which is a program; it was not loaded")
        return read_pickle(reader.get_record("data.pkl")), reader
    except (RuntimeError, UnicodeDecodeError) as error:
        raise PickleRefused(f"it is damaged ({_first_sentence(error)})") from error


class PartOfFile(io.RawIOBase):
    """File object over `length` bytes of a file, starting at `offset`."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = max(0, start + position)
        return self.position

    def readinto(self, buffer) -> int:
        self.file.seek(self.offset + self.position)
        piece = self.file.read(max(0, min(len(buffer), self.length - self.position)))
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)


def _records_in(tree) -> Iterator[Record]:
    """Every record in a tree of containers and records; cycles are entered once."""
    pending, seen = [tree], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        if isinstance(node, Record):
            yield node
            node = (node.args, node.state)
        if isinstance(node, (dict, list, tuple, set, frozenset)):
            seen.add(id(node))
            pending.extend([*node.keys(), *node.values()] if isinstance(node, dict) else node)


def _bytes_of(record: Record) -> bytes:
    """The content of a pickled BytesIO."""
    given = record.args if record.state is None else record.state
    content = b"" if given == () else given[0] if isinstance(given, tuple) else given
    if not isinstance(content, bytes):
        raise PickleRefused(f"it holds a BytesIO made in an unknown way ({content!r})")
    return content


def _bytes_in_tensor(tensor: Record, reader) -> bytes:
    """The data of a byte tensor that covers its whole storage."""
    try:
        (kind, dtype, name, _, size), *view = tensor.args[:4]
        if (kind, dtype, view) != ("storage", "torch.ByteStorage", [0, (size,), (1,)]):
            raise PickleRefused(f"it holds {tensor!r}, not a tensor of bytes; it was not loaded")
        return reader.get_record(f"data/{name}") if size else b""
    except (TypeError, ValueError) as error:
        raise PickleRefused(f"it is damaged: {tensor!r}") from error
    except RuntimeError as error:
        raise PickleRefused(f"it is damaged ({_first_sentence(error)})") from error


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].split(". ")[0]
