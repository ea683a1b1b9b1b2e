"""2,000 archives damaged at random: each reads back as what was put into it, or is refused in one line.

A tar file has checksums for its headers but not for its contents. So a byte changed inside a member is read back
changed, if the member's content still makes sense; anywhere else, a change must not alter what is read.
"""

import collections
import gzip
import io
import json
import random
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.nemo_archive import naming, opened
from nemo_aligner.utils.nemo_weights import check_weight_sizes, read_weights

BLOCK = tarfile.BLOCKSIZE
COUNT = 1000  # of each kind: plain and gzipped


@dataclass
class Original:
    data: bytes
    files: dict[str, bytes]
    places: dict[str, int]  # where in `data` a file's content starts
    headers: list[int]
    shapes: dict


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Original:
    folder = tmp_path_factory.mktemp("original")
    weights = folder / "model_weights"
    names = ("model.embedding.word_embeddings.weight", "model.decoder.layers.self_attention.linear_proj.weight")
    state = {names[0]: torch.rand(6, 4), names[1]: torch.rand(2, 4, 4), "model.decoder.layers._extra_state": None}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(weights), no_dist=True)
    torch.save({}, weights / "common.pt")
    (weights / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / "tokenizer.json").write_text("{}" * 40)
    config = {
        "num_layers": 2, "hidden_size": 4, "num_attention_heads": 2,
        "tokenizer": {"library": "huggingface", "files": {"tokenizer_json": "nemo:tokenizer.json"}},
    }  # fmt: skip
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:") as archive:  # the way NeMo writes archives
        archive.add(folder, arcname=".")
    packed.seek(0)
    with tarfile.open(fileobj=packed) as archive:
        members = archive.getmembers()
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    places = {str(Path(member.name)): member.offset_data for member in members if member.isreg()}
    shapes = {name: tuple(value.shape) for name, value in state.items() if value is not None}
    return Original(packed.getvalue(), files, places, [member.offset for member in members], shapes)


def read(path: Path) -> tuple[dict, dict]:
    """Everything that is read from an archive before a model is built: its files and the shapes of its tensors."""
    with opened(path) as checkpoint:
        config = checkpoint.config()
        with naming(checkpoint.where):
            weights = read_weights(checkpoint.folder)
            check_weight_sizes(weights, config)
        files = {str(file.relative_to(checkpoint.folder)): file.read_bytes() for file in checkpoint.folder.rglob("*.*")}
    return files, weights.shapes


# ---- the damage. Each function changes `data` and returns whether the members' contents are still at their offsets.


def flip_bits(rng: random.Random, data: bytearray, original: Original) -> bool:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return True


def truncate(rng: random.Random, data: bytearray, original: Original) -> bool:
    del data[rng.randrange(len(data)) :]
    return False


def edit_header(rng: random.Random, data: bytearray, original: Original) -> bool:
    """Overwrite a header field with arbitrary text, and correct the checksum."""
    start = rng.choice(original.headers)
    header = data[start : start + BLOCK]
    size = int(header[124:135], 8)
    name, offset, width = rng.choice(
        [("name", 0, 100), ("mode", 100, 8), ("size", 124, 12), ("mtime", 136, 12), ("type", 156, 1),
         ("link", 157, 100), ("magic", 257, 8), ("device", 329, 16), ("prefix", 345, 155)]
    )  # fmt: skip
    text = {
        "name": rng.choice([b"../../outside", b"/tmp/outside", b"./model_config.yaml", b"", b"\xff\0", b"a" * 100]),
        "size": b"%011o" % rng.choice([0, size - 1, size // 2, size + 1, size + 512, 2**32]),
        "type": rng.choice([b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"V", b"\0", b"?"]),
        "link": rng.choice([b"/etc/passwd", b"../x", b""]),
        "prefix": rng.choice([b"..", b"/tmp", b"x"]),
    }.get(name, rng.randbytes(width))
    if name == "size" and rng.random() < 0.3:
        text = rng.randbytes(width)
    header[offset : offset + width] = text.ljust(width, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[start : start + BLOCK] = header
    return True


def rename_member(rng: random.Random, data: bytearray, original: Original) -> bool:
    first, second = rng.sample(original.headers[1:], 2)
    for start, source in ((first, second), (second, first) if rng.random() < 0.5 else (first, second)):
        header = data[start : start + BLOCK]
        header[:100] = original.data[source : source + 100]
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[start : start + BLOCK] = header
    return False


def repeat_blocks(rng: random.Random, data: bytearray, original: Original) -> bool:
    start, end, target = (rng.choice([*original.headers, len(data)]) for _ in range(3))
    data[target:target] = data[min(start, end) : max(start, end)]
    return False


def remove_blocks(rng: random.Random, data: bytearray, original: Original) -> bool:
    # Never from the last member: the zeros at the archive's end would be read as its content, undetectably.
    start = rng.randrange(0, max(original.places.values()), BLOCK)
    del data[start : start + BLOCK * rng.randint(1, 4)]
    return False


def insert_block(rng: random.Random, data: bytearray, original: Original) -> bool:
    start = rng.randrange(0, len(data) + 1, BLOCK)
    data[start:start] = rng.choice([bytes(BLOCK), rng.randbytes(BLOCK), b"\xff" * BLOCK])
    return False


def append(rng: random.Random, data: bytearray, original: Original) -> bool:
    data += rng.choice([bytes(rng.randrange(2048)), rng.randbytes(rng.randrange(1, 2048)), original.data])
    return False


def edit_content(rng: random.Random, data: bytearray, original: Original) -> bool:
    """Damage the files that describe the tensors: their parsers are the likeliest to fail."""
    name = rng.choice([name for name in original.files if not name.endswith(".distcp")])
    place, size = original.places[name], len(original.files[name])
    for _ in range(rng.randint(1, 8)):
        data[place + rng.randrange(size)] = rng.choice([0, 0xFF, rng.randrange(256), ord("r"), ord("b")])
    return True


DAMAGES = (
    flip_bits, truncate, edit_header, edit_header, rename_member, repeat_blocks, remove_blocks, insert_block, append,
    edit_content, edit_content,
)  # fmt: skip


def damage_plain(rng: random.Random, original: Original) -> tuple[str, bytes, dict[str, bytes]]:
    data = bytearray(original.data)
    function = rng.choice(DAMAGES)
    in_place = function(rng, data, original)
    expected = original.files
    if in_place:
        expected = {
            name: bytes(data[place : place + len(original.files[name])]) for name, place in original.places.items()
        }
    return function.__name__, bytes(data), expected


def damage_gzipped(rng: random.Random, original: Original) -> tuple[str, bytes, dict[str, bytes]]:
    """Damage the archive either before compression, or after it, where gzip's checksum catches everything."""
    if rng.random() < 0.3:
        name, data, expected = damage_plain(rng, original)
        return name, gzip.compress(data, 1), expected
    data = bytearray(gzip.compress(original.data, 1))
    function = rng.choice([flip_bits, truncate, append])
    function(rng, data, original)
    return function.__name__, bytes(data), original.files


@pytest.mark.parametrize("damage", [damage_plain, damage_gzipped])
def test_a_damaged_archive_reads_as_it_was_or_is_refused(original, damage, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "damaged.nemo"
    outcomes = collections.Counter()
    for seed in range(COUNT):
        kind, data, expected = damage(random.Random(seed), original)
        path.write_bytes(data)
        try:
            files, shapes = read(path)
        except ConfigError as error:
            outcomes["refused"] += 1
            assert str(error).startswith("pretrained_checkpoint.restore_from_path: the archive "), error
            assert "\n" not in str(error), (seed, kind)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {kind}: {error!r}") from error
        else:
            outcomes["read"] += 1
            if files["model_weights/.metadata"] == original.files["model_weights/.metadata"]:
                assert shapes == original.shapes, (seed, kind)
            for name, content in expected.items():
                found = files[name]
                # A damaged size may have grown, within the member's last block, over the zeros that pad it.
                assert found.startswith(content) and not found[len(content) :].strip(b"\0"), (seed, kind, name)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["damaged.nemo", "temporary"], (seed, kind)
        assert not list((tmp_path / "temporary").iterdir()), (seed, kind)
    assert outcomes["read"] > COUNT / 50 and outcomes["refused"] > COUNT / 2, outcomes


def test_the_undamaged_archive_is_read(original, tmp_path):
    for name, data in (("plain", original.data), ("gzipped", gzip.compress(original.data))):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == (original.files, original.shapes)
