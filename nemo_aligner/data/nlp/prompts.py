"""Prompt files: UTF-8 JSON lines, one object per line with a string under `text`; other keys are the user's own."""

import json
import os
import zlib
from array import array
from typing import BinaryIO

from nemo_aligner.utils.errors import ConfigError


class PromptFile:
    """The records of a prompt file by row number; blank lines do not count.

    Opening reads and checks the whole file, without a tokenizer, but keeps only 8 bytes per record; records are read on
    access. An instance holds no open file, so it can be pickled to loader workers.

    Opening raises ValueError, in one line that names the file, the line and the fix, for the first error found.
    Accessing a record raises ConfigError if the file has changed since it was opened.
    """

    def __init__(self, path: str):
        self.path = path
        self._offsets, self._version, self._checksum = _find_records(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> dict:
        offset = self._offsets[row]
        with open(self.path, "rb") as file:
            if self._has_changed(file):
                raise ConfigError(
                    f"{self.path}: the prompt file has changed since this run opened it; start the run again, and "
                    "leave its files as they are"
                )
            file.seek(offset)
            return _parse_record(file.readline(), f"{self.path}, byte {offset}")

    def _has_changed(self, file: BinaryIO) -> bool:
        version = _version(file)
        if version == self._version:
            return False
        if version[0] != self._version[0] or _checksum(file) != self._checksum:
            return True
        self._version = version  # touched, or replaced by an identical copy
        return False


def _version(file: BinaryIO) -> tuple[int, int]:
    """Size and modification time, to detect changes of a file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _checksum(file: BinaryIO) -> int:
    checksum = 0
    while chunk := file.read(2**20):
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def _find_records(path: str) -> tuple[array, tuple[int, int], int]:
    """Check all records of a file; returns their byte offsets, the file's version and its checksum."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such prompt file; correct the path in model.data.data_prefix")
    offsets = array("q")
    offset = checksum = 0
    with open(path, "rb") as file:
        version = _version(file)
        for number, line in enumerate(file, start=1):
            if line.strip():
                _parse_record(line, f"{path}, line {number}")
                offsets.append(offset)
            offset += len(line)
            checksum = zlib.crc32(line, checksum)
    if not offsets:
        raise ValueError(f'{path}: the prompt file holds no records; write one {{"text": "..."}} per line')
    return offsets, version, checksum


def _parse_record(line: bytes, where: str) -> dict:
    try:
        # "-sig" because some editors write a byte order mark before the first line.
        record = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason}, byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{where}: not valid JSON ({error.msg}, column {error.colno}); write one {{"text": "..."}} per line'
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply to be read; flatten it") from None
    except ValueError as error:  # raised only for integers of thousands of digits
        raise ValueError(f"{where}: {error.args[0].split(';')[0]}; write the number as a string") from None
    if not isinstance(record, dict):
        raise ValueError(f'{where}: a {type(record).__name__}, not an object; write one {{"text": "..."}} per line')
    if "text" not in record:
        raise ValueError(f'{where}: no "text" among the keys {list(record)}; put the prompt under "text"')
    if not isinstance(record["text"], str):
        raise ValueError(f'{where}: "text" is a {type(record["text"]).__name__}; put the prompt there as a string')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        half = record["text"][error.start]
        raise ValueError(
            f'{where}: "text" holds {half!r}, half of a surrogate pair; write both halves, or the character itself'
        ) from None
    return record
