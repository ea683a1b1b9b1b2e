"""What an archive must not do: write outside its folder, run code, leave files behind, exhaust memory, lack a part."""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
import yaml

from nemo_aligner.compat.checkpoint_pickles import PickleRefused, read_pickle
from nemo_aligner.convert.hf_to_nemo import convert
from nemo_aligner.utils import nemo_archive
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.nemo_archive import check_archive, extract, naming, opened
from nemo_aligner.utils.nemo_weights import read_weights

WEIGHTS = "model_weights"


def read(path: Path) -> dict[str, bytes]:
    """Run every check that precedes building a model; returns the files."""
    with opened(path) as checkpoint:
        checkpoint.config()
        with naming(checkpoint.where):
            read_weights(checkpoint.folder)
        return files_in(checkpoint.folder)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_tar(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in more:
            archive.addfile(member, io.BytesIO(bytes(member.size)) if member.isreg() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 4) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size if kind == tarfile.REGTYPE else 0
    return info


@pytest.fixture(scope="module")
def files(tiny_nemo, tmp_path_factory) -> dict[str, bytes]:
    """The members of the tiny model's archive, by name."""
    folder = tmp_path_factory.mktemp("extracted")
    with tarfile.open(tiny_nemo) as archive:
        archive.extractall(folder, filter="data")
    return files_in(folder)


@pytest.fixture(scope="module")
def zarr_files(tiny_hf, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("zarr")
    convert(tiny_hf, folder / "zarr.nemo", dist_ckpt_format="zarr")
    with tarfile.open(folder / "zarr.nemo") as archive:
        archive.extractall(folder / "extracted", filter="data")
    return files_in(folder / "extracted")


@pytest.fixture
def box(tmp_path, monkeypatch):
    """The folder for archives, next to the one where they are extracted; nothing else may appear in their parent."""
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    assert not list((tmp_path / "temporary").iterdir())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["here", "temporary"]
    assert not Path("ran").exists()


def refusal(path: Path, read=read) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path)
    message = str(caught.value)
    kind = "folder" if path.is_dir() else "archive"
    assert message.startswith(f"pretrained_checkpoint.restore_from_path: the {kind} {path}") and "\n" not in message
    return message


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


# ---- reading


def test_archives_gzipped_archives_and_folders_read_alike(files, box):
    plain = write_tar(box / "plain.nemo", files)
    (box / "gzipped.nemo").write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, box / "gzipped.nemo", write_folder(box / "folder", files)):
        check_archive(path)
        assert read(path) == files
    assert (box / "folder").is_dir()


def test_zarr_reads_too(zarr_files, box):
    assert read(write_tar(box / "zarr.nemo", zarr_files)) == zarr_files


def test_only_what_is_wanted_is_extracted(files, box):
    path = write_tar(box / "plain.nemo", files)
    with opened(path, only={"model_config.yaml"}) as checkpoint:
        assert list(files_in(checkpoint.folder)) == ["model_config.yaml"] and checkpoint.config().num_layers == 4
    (box / "some").mkdir()
    extract(path, box / "some", only={"./model_weights/common.pt"})
    assert list(files_in(box / "some")) == ["model_weights/common.pt"]
    (box / "none").mkdir()
    extract(path, box / "none", only=set())
    assert not files_in(box / "none")


def test_a_large_member_is_streamed(files, box):
    size = 300 * 2**20
    path = box / "large.nemo"
    with gzip.open(path, "wb", compresslevel=1) as output, tarfile.open(fileobj=output, mode="w:") as archive:
        for name, content in files.items():
            info = member(name, size=len(content))
            archive.addfile(info, io.BytesIO(content))
        with open("/dev/zero", "rb") as zeros:
            archive.addfile(member("model_weights/large", size=size), zeros)
    tracemalloc.start()
    with opened(path) as checkpoint:
        assert (checkpoint.folder / "model_weights/large").stat().st_size == size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_what_does_not_fit_on_the_disk_is_not_begun(files, box, monkeypatch):
    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(free, 0, free))

    path = write_tar(box / "bad.nemo", {**files, "model_weights/zeros": bytes(2**23)})
    leave(path.stat().st_size - 1)
    assert "it has 0.0 GiB, but" in refusal(path) and "set the environment variable TMPDIR" in refusal(path)
    path.write_bytes(gzip.compress(path.read_bytes()))
    leave(2**23 - 1)
    assert "model_weights/zeros has 0.0 GiB, but" in refusal(path)
    leave(2**23)
    read(path)


def test_a_failure_inside_leaves_nothing(files, box):
    with pytest.raises(KeyboardInterrupt), opened(write_tar(box / "plain.nemo", files)) as checkpoint:
        assert checkpoint.folder.is_dir()
        raise KeyboardInterrupt


# ---- members that do not belong in an archive


@pytest.mark.parametrize(
    "info, why",
    [
        (member("../outside"), "the member ../outside would be written outside the target folder"),
        (member("model_weights/../../outside"), "would be written outside"),
        (member("/tmp/outside"), "would be written outside"),
        (member("a\0b"), None),
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), "the member link is a link"),
        (member("link", tarfile.LNKTYPE, "model_config.yaml"), "the member link is a link"),
        (member("model_weights/../link", tarfile.SYMTYPE, "."), "would be written outside"),
        (member("pipe", tarfile.FIFOTYPE), "the member pipe is neither a file nor a folder"),
        (member("device", tarfile.CHRTYPE), "the member device is neither a file nor a folder"),
        (member("disk", tarfile.BLKTYPE), "neither a file nor a folder"),
        (member("sparse", tarfile.GNUTYPE_SPARSE), "neither a file nor a folder"),
        (member("model_config.yaml"), "the member model_config.yaml is there twice"),
        (member("model_weights/.//common.pt"), "is there twice"),
        (member("model_weights"), "the member model_weights cannot be written"),
        (member("model_config.yaml/x"), "the member model_config.yaml/x cannot be written"),
        (member("x" * 300), "cannot be written (File name too long)"),
        (member("."), "a member has no name"),
    ],
    ids=lambda value: ascii(value.name)[:30] if isinstance(value, tarfile.TarInfo) else "",
)
def test_a_member_that_has_no_place(files, box, info, why):
    path = write_tar(box / "bad.nemo", files, info)
    if why is None:  # the zero byte terminates the name
        assert set(read(path)) == {*files, "a"}
    else:
        assert why in refusal(path)


def test_a_link_is_not_followed_to_write_through_it(files, box):
    (box.parent / "here" / "target").mkdir()
    link = member("escape", tarfile.SYMTYPE, str(box / "target"))
    path = write_tar(box / "bad.nemo", files, link, member("escape/file"))
    assert "the member escape is a link" in refusal(path)
    assert "the member escape is a link" in refusal(path, check_archive)
    assert not list((box / "target").iterdir())


def test_a_header_that_asks_for_memory(files, box):
    huge = member("header", tarfile.XHDTYPE)
    huge.size = 4 * 2**30
    data = huge.tobuf() + write_tar(box / "good.nemo", files).read_bytes()
    (box / "bad.nemo").write_bytes(data)
    assert f"a header of {4 * 2**30} bytes" in refusal(box / "bad.nemo")


def test_too_many_members(files, box, monkeypatch):
    monkeypatch.setattr(nemo_archive, "_MOST_MEMBERS", len(files))
    read(write_tar(box / "good.nemo", files))
    path = write_tar(box / "bad.nemo", files, member("one"))
    assert f"it has more than {len(files)} members" in refusal(path)


@pytest.mark.parametrize("name", ["model_config.yaml", "model_weights/common.pt"])
def test_a_link_or_pipe_in_a_folder(files, box, name):
    folder = write_folder(box / "folder", files)
    (folder / name).rename(box / "elsewhere")
    (folder / name).symlink_to(box / "elsewhere")
    assert f"{name} is a link; put the file in its place" in refusal(folder, check_archive)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is neither a file nor a folder" in refusal(folder)


# ---- parts that are missing or truncated


@pytest.mark.parametrize(
    "name", ["model_config.yaml", "tokenizer.json", "common.pt", "metadata.json", ".metadata", "__0_0.distcp"]
)
@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_a_missing_member_is_named(files, box, name, write):
    rest = {path: content for path, content in files.items() if not path.endswith(name)}
    assert len(rest) == len(files) - 1
    message = refusal(write(box / "bad", rest))
    assert f"{name} is missing" in message or f"has no {name}" in message


def test_no_weights_at_all(files, box):
    rest = {path: content for path, content in files.items() if WEIGHTS not in path}
    assert "has no model weights" in refusal(write_tar(box / "bad.nemo", rest))


def test_weights_of_two_kinds(files, box):
    """NeMo prefers the file to the folder."""
    both = {**files, "model_weights.ckpt": files[f"{WEIGHTS}/common.pt"]}
    assert "two kinds of weights, model_weights and model_weights.ckpt" in refusal(write_tar(box / "bad.nemo", both))
    of_rank = {**files, "mp_rank_00/model_weights.ckpt": files[f"{WEIGHTS}/common.pt"]}
    assert "two kinds of weights" in refusal(write_tar(box / "bad.nemo", of_rank))


@pytest.mark.parametrize("name", ["model_config.yaml", "metadata.json", "common.pt", ".metadata", "__0_1.distcp"])
@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_a_cut_member_is_named(files, box, name, write):
    (path,) = (path for path in files if path.endswith(name))
    size = len(files[path]) // (20 if name.endswith("yaml") else 2)
    message = refusal(write(box / "bad", {**files, path: files[path][:size]}))
    assert name in message, message


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_gzip_is_refused(files, box, share):
    data = gzip.compress(write_tar(box / "plain.nemo", files).read_bytes())
    (box / "bad.nemo").write_bytes(data[: int(len(data) * share)])
    for look in (read, check_archive):
        assert "bad.nemo is not a complete .nemo archive" in refusal(box / "bad.nemo", look)


def test_a_damaged_header_does_not_pass_for_the_end(files, box):
    data = bytearray(write_tar(box / "bad.nemo", files).read_bytes())
    with tarfile.open(box / "bad.nemo") as archive:
        last = archive.getmembers()[-1]
    data[last.offset] ^= 1
    (box / "bad.nemo").write_bytes(data)
    assert f"a damaged header at byte {last.offset}" in refusal(box / "bad.nemo", check_archive)


def test_a_size_that_is_too_small(files, box):
    """The remainder of the content would be mistaken for the zeros that pad its block."""
    data = bytearray(write_tar(box / "bad.nemo", files).read_bytes())
    with tarfile.open(box / "bad.nemo") as archive:
        info = archive.getmember("./model_config.yaml")
    info.size -= 1
    data[info.offset : info.offset + 512] = info.tobuf()
    (box / "bad.nemo").write_bytes(data)
    assert "./model_config.yaml goes on after its end" in refusal(box / "bad.nemo")


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda array: {**array, "compressor": {"id": "pickle"}}, ".zarray: arrays with codecs"),
        (lambda array: {**array, "filters": [{"id": "pickle"}]}, ".zarray: arrays with codecs"),
        (lambda array: {**array, "dtype": "|O"}, ".zarray: the dtype '|O' is not one of numbers"),
        (lambda array: {**array, "shape": [4, 65]}, "linear_fc1.layer_norm_weight/0.1 is missing"),
        (lambda array: {**array, "shape": [5, 64]}, "linear_fc1.layer_norm_weight/4.0 is missing"),
        (lambda array: {**array, "shape": [10**30, 64]}, f"has 4 files, but .zarray describes {10**30}"),
        (lambda array: {**array, "chunks": [1, 65]}, "0.0 has 256 bytes, not 260"),
        (lambda array: {**array, "chunks": [0, 64]}, "are no sizes"),
        (lambda array: {}, "the dtype None"),
        (lambda array: [], "holds a list, not an object"),
    ],
)
def test_arrays_of_zarr(zarr_files, box, change, why):
    name = "model_weights/model.decoder.layers.mlp.linear_fc1.layer_norm_weight/.zarray"
    changed = json.dumps(change(json.loads(zarr_files[name]))).encode()
    assert why in refusal(write_tar(box / "bad.nemo", {**zarr_files, name: changed}))


def test_missing_chunks_of_zarr(zarr_files, box):
    name = "model_weights/model.embedding.word_embeddings.weight/0.0"
    rest = {path: content for path, content in zarr_files.items() if path != name}
    assert f"{name} is missing" in refusal(write_tar(box / "bad.nemo", rest))


# ---- pickles


class Evil:
    def __reduce__(self):
        return open, ("ran", "w")


def saved(value) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.fixture
def evil(box):
    """A pickle that is verified to run code when it is loaded."""
    content = pickle.dumps(Evil())
    pickle.loads(content).close()
    Path("ran").unlink()
    return content


def with_part(files: dict[str, bytes], ending: str, content: bytes) -> dict[str, bytes]:
    """The files with new content for the part whose name ends in `ending`, appended to the file of the old one."""
    metadata = pickle.loads(files[f"{WEIGHTS}/.metadata"])
    (place,) = (place for index, place in metadata.storage_data.items() if index.fqn.endswith(ending))
    name = f"{WEIGHTS}/{place.relative_path}"
    place.offset, place.length = len(files[name]), len(content)
    return {**files, name: files[name] + content, f"{WEIGHTS}/.metadata": pickle.dumps(metadata)}


def test_the_way_parts_are_exchanged_here_is_sound(files, box):
    exchanged = [
        with_part(files, "linear_fc1._extra_state/shard_0_4", content)
        for content in (saved([None]), saved([io.BytesIO(saved(None))]), saved([as_tensor(pickle.dumps({"a": 1}))]))
    ]
    exchanged.append(with_part(files, "final_layernorm.weight", saved(torch.ones(64))))
    for good in exchanged:
        assert read(write_tar(box / "good.nemo", good)) == good != files


@pytest.mark.parametrize(
    "change",
    [
        lambda files, evil: {**files, f"{WEIGHTS}/.metadata": evil},
        lambda files, evil: {**files, f"{WEIGHTS}/common.pt": saved(Evil())},
        lambda files, evil: with_part(files, "linear_fc1._extra_state/shard_0_4", saved(Evil())),
        lambda files, evil: with_part(files, "linear_fc1._extra_state/shard_0_4", saved([io.BytesIO(saved(Evil()))])),
        lambda files, evil: with_part(files, "linear_fc1._extra_state/shard_0_4", saved([as_tensor(evil)])),
        lambda files, evil: with_part(files, "final_layernorm.weight", saved(Evil())),
    ],
    ids=["metadata", "common", "object", "torch file in an object", "pickle in an object", "tensor"],
)
@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_a_pickle_that_wants_to_run_code(files, evil, box, change, write):
    message = refusal(write(box / "bad", change(files, evil)))
    assert "it wants to use io.open, which no weights need; it was not loaded" in message
    assert f": {WEIGHTS}/" in message


def test_pickles_beside_zarr_arrays(zarr_files, evil, box):
    name = f"{WEIGHTS}/model.decoder.layers.mlp.linear_fc1._extra_state/shard_0_4.pt"
    message = refusal(write_tar(box / "bad.nemo", {**zarr_files, name: saved(Evil())}))
    assert f"{name}: it wants to use io.open" in message


@pytest.mark.parametrize("name", ["model_weights.ckpt", "mp_rank_00/model_weights.ckpt"])
def test_pickles_of_files_of_torch_save(files, evil, box, name):
    rest = {path: content for path, content in files.items() if WEIGHTS not in path}
    read(write_tar(box / "good.nemo", {**rest, name: saved({"model.weight": torch.ones(2)})}))
    for content in (saved({"model.weight": Evil()}), saved({Evil(): 1})):
        assert f"{name}: it wants to use io.open" in refusal(write_tar(box / "bad.nemo", {**rest, name: content}))
    assert "is not a file that torch.save wrote" in refusal(write_tar(box / "bad.nemo", {**rest, name: evil}))


def test_torchscript_is_refused(files, box):
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), program)
    path = write_tar(box / "bad.nemo", {**files, f"{WEIGHTS}/common.pt": program.getvalue()})
    assert "common.pt: it is TorchScript, which is a program" in refusal(path)


@pytest.mark.parametrize(
    "pickled, why",
    [
        (b"cos\nsystem\n.", "os.system"),
        (b"c__builtin__\neval\n.", "builtins.eval"),
        (b"\x80\x04\x8c\x05torch\x8c\x0dserialization\x93.", "torch.serialization"),
        (b"\x80\x04\x8c\x05torch\x8c\x0cSize.__new__\x93.", "torch.Size.__new__"),
        (b"ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),
        (b"\x80\x02\x82\x01.", "the extension 1"),
        # calling a storage class, or bytes, would allocate whatever size the file asks for
        (b"ctorch\nFloatStorage\n(J\xff\xff\xff\x7ftR.", "damaged"),
        (b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.", "damaged"),
        (b"Nr\xff\xff\xff\x7f.", "memo index 2147483647"),
        # setting the state of a class would change it for the whole process
        (b"ctorch\nSize\n}b.", "damaged"),
        (b"ctorch\nSize\n(tR}b}b.", "its state twice"),
        (b"\x80\x04\x8c", "damaged"),
        (b"", "damaged"),
    ],
)
def test_pickles_by_hand(box, pickled, why):
    with pytest.raises(PickleRefused, match=why):
        read_pickle(pickled)


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda place: setattr(place, "relative_path", "../../../etc/passwd"), "passwd is missing, where"),
        (lambda place: setattr(place, "relative_path", "/etc/passwd"), "passwd is missing, where"),
        (lambda place: setattr(place, "offset", -1), "is damaged"),
        (lambda place: setattr(place, "length", 2**40), "ends before"),
        (lambda place: setattr(place, "transform_descriptors", ["stream.zstd"]), "is damaged"),
    ],
)
def test_places_that_are_not_there(files, box, change, why):
    metadata = pickle.loads(files[f"{WEIGHTS}/.metadata"])
    (place,) = (place for index, place in metadata.storage_data.items() if index.fqn.endswith("final_layernorm.weight"))
    change(place)
    assert why in refusal(write_tar(box / "bad.nemo", {**files, f"{WEIGHTS}/.metadata": pickle.dumps(metadata)}))


def test_a_tensor_that_is_stored_nowhere(files, box):
    metadata = pickle.loads(files[f"{WEIGHTS}/.metadata"])
    (index,) = (index for index in metadata.storage_data if index.fqn.endswith("final_layernorm.weight"))
    del metadata.storage_data[index]
    path = write_tar(box / "bad.nemo", {**files, f"{WEIGHTS}/.metadata": pickle.dumps(metadata)})
    assert "it does not say where model.decoder.final_layernorm.weight is stored" in refusal(path)


def test_a_part_of_another_shape(files, box):
    path = write_tar(box / "bad.nemo", with_part(files, "final_layernorm.weight", saved(torch.ones(65))))
    assert "model.decoder.final_layernorm.weight: it is " in (message := refusal(path))
    assert message.endswith("not a tensor of shape (64,)")


# ---- configs


def config_with(files: dict[str, bytes], **changes) -> dict[str, bytes]:
    config = {**yaml.safe_load(files["model_config.yaml"]), **changes}
    return {**files, "model_config.yaml": yaml.safe_dump(config).encode()}


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"num_layers": None}, "num_layers is None, not a positive number"),
        ({"hidden_size": "64"}, "hidden_size is '64', not a positive number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"tokenizer": None}, "tokenizer.library is None; supported are huggingface, sentencepiece"),
        ({"tokenizer": {"library": "tabular", "vocab_file": "x"}}, "tokenizer.library is 'tabular'"),
        ({"tokenizer": {"library": "sentencepiece", "model": "nemo:a.model"}}, "the member a.model is missing"),
        ({"tokenizer": {"library": "sentencepiece", "model": "nemo:../a.model"}}, "the member ../a.model is missing"),
        ({"tokenizer": {"library": "huggingface", "trust_remote_code": True}}, "tokenizer.trust_remote_code=True"),
        ({"_target_": "os.system"}, "_target_='os.system' would run code that the archive names"),
        ({"optim": {"sched": [{"_target_": "os.system"}]}}, "optim.sched.0._target_='os.system' would run code"),
        ({"cls": "os.system", "params": {}}, "cls='os.system' would run code"),
        ({"model": {"_target_": "os.system"}}, "because of its key model, NeMo would build from that section"),
        ({"optim": '${oc.decode:"{_target_: os.system}"}'}, "is an interpolation; put the value itself there"),
    ],
)  # fmt: skip
def test_configs_that_no_model_is_built_from(files, box, changes, why):
    assert why in refusal(write_tar(box / "bad.nemo", config_with(files, **changes)))


@pytest.mark.parametrize(
    "text, why",
    [
        (b"", "num_layers is None"),
        (b"a: [", "model_config.yaml cannot be read"),
        (b"- 1", "model_config.yaml holds a ListConfig, not a mapping"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"a: &a [1]\nb: [*a, *a]", "has YAML aliases"),
        (b"a: !!python/object/apply:os.system ['touch ran']", "cannot be read"),
        (b"[" * 5000, "nested more than 50 levels deep"),
    ],
)
def test_configs_that_cannot_be_read(files, box, text, why):
    assert why in refusal(write_tar(box / "bad.nemo", {**files, "model_config.yaml": text}))


def test_unknown_keys_of_a_config_are_nobody_s_business(files, box):
    path = write_tar(box / "good.nemo", config_with(files, of_another_program={"a": [1, {"b": None}]}))
    with opened(path) as checkpoint:
        assert checkpoint.config().of_another_program == {"a": [1, {"b": None}]}
