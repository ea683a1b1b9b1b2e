"""Run the suite on the CPU, one thread of work at a time; tests in tests/gpu skip themselves without a GPU."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_aligner.compat import cpu, device

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    cpu.enable()


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory):
    """Folder with a tiny random Llama model and its tokenizer; see tests/tiny.py."""
    from tests.tiny import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_nemo(tiny_hf, tmp_path_factory):
    """The same model as a `.nemo` archive."""
    path = tmp_path_factory.mktemp("tiny_nemo") / "tiny.nemo"
    if device.on_cpu():
        from nemo_aligner.convert.hf_to_nemo import convert

        convert(tiny_hf, path)
    else:  # the converter runs on the CPU, so it needs its own process
        script = Path(__file__).parent.parent / "examples/nlp/gpt/convert_hf_to_nemo.py"
        subprocess.run([sys.executable, script, "--input", tiny_hf, "--output", path], check=True)
    return path


@pytest.fixture
def log_lines(monkeypatch):
    """NeMo's log messages at WARNING and above, including log-once messages that were already logged earlier."""
    from nemo.utils import logging as nemo_logging

    lines = []

    def note(level, message, *args, **kwargs):
        if level >= logging.WARNING:
            lines.append(message)

    monkeypatch.setattr(nemo_logging, "once_logged", set())
    monkeypatch.setattr(nemo_logging._logger, "_log", note)
    return lines


@pytest.fixture(scope="module", autouse=True)
def leave_no_process_group():
    """Loading a model initializes a process group; destroy it, so that the next module starts without one."""
    yield
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
