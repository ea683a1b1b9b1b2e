"""Prompt files: UTF-8 JSON lines, one object per line with a string under `text`; other keys are the user's own."""

import json
import os
from array import array


class PromptFile:
    """The records of a prompt file by row number; blank lines are no rows.

    Opening reads and checks the whole file, which takes no tokenizer, but keeps only 8 bytes a record; the records
    themselves are read when asked for. An instance holds no open file, so loader workers can be sent a copy.

    Opening raises ValueError, in one line that names the file, the line and the fix, for the first thing that is wrong.
    """

    def __init__(self, path: str):
        self.path = path
        self._offsets = _find_records(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> dict:
        offset = self._offsets[row]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return _parse_record(file.readline(), f"{self.path}, byte {offset}")


def _find_records(path: str) -> array:
    """Byte offsets of all records of a file, each of which has been checked."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such prompt file; correct the path in model.data.data_prefix")
    offsets = array("q")
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                _parse_record(line, f"{path}, line {number}")
                offsets.append(offset)
            offset += len(line)
    if not offsets:
        raise ValueError(f'{path}: the prompt file holds no records; write one {{"text": "..."}} per line')
    return offsets


def _parse_record(line: bytes, where: str) -> dict:
    try:
        # "-sig" because some editors put a byte order mark in front of the first line
        record = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason}, byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{where}: not valid JSON ({error.msg}, column {error.colno}); write one {{"text": "..."}} per line'
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f'{where}: a {type(record).__name__}, not an object; write one {{"text": "..."}} per line')
    if "text" not in record:
        raise ValueError(f'{where}: no "text" among the keys {list(record)}; put the prompt under "text"')
    if not isinstance(record["text"], str):
        raise ValueError(f'{where}: "text" is a {type(record["text"]).__name__}; put the prompt there as a string')
    return record
