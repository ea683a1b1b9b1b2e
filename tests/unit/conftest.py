"""Fixtures of the tests that check configurations."""

import io
import json
import tarfile
from pathlib import Path

import pytest


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The test's working directory, with the files that a run needs."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open("model.nemo", "w") as archive:
        for name, content in (("./model_config.yaml", b"a: 1"), ("./model_weights/weights", bytes(5000))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for name, count in (("train", 8), ("val", 2)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": f"prompt {i}"}) + "\n" for i in range(count)))
    Path("reward.py").write_text("def reward(prompts, responses, *, weight=1.0):\n    return [weight] * len(prompts)\n")
    return tmp_path


@pytest.fixture
def warnings(monkeypatch):
    """Lines that the checks have warned of."""
    from nemo_aligner.utils import config_checks

    written = []
    monkeypatch.setattr(config_checks.logging, "warning", written.append)
    return written
