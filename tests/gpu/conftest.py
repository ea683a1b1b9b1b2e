"""Tests in this folder run on a GPU or are skipped; measured deviations are printed as a table at the end."""

import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path

import megatron.core
import pytest
import torch
from filelock import FileLock

# Kernels run in Triton's interpreter on a CPU; only modules that set RUNS_INTERPRETED are tested this way.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            is_interpreted = INTERPRETED and getattr(item.module, "RUNS_INTERPRETED", False)
            if "tests/gpu" in str(item.path) and not is_interpreted:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def exact_matmuls():
    """Float32 means float32: no TF32 in these tests."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # Transformer Engine ignores torch's flags; cuBLAS reads this at first use


@pytest.fixture
def normal() -> Callable[..., torch.Tensor]:
    """`normal(*shape, dtype=...)`: random numbers on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype: torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture(scope="session")
def own_layers():
    """For tests of our own layers, which are used where Transformer Engine is not installed."""
    if not INTERPRETED and importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine's layers take the place of ours")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`made_once(name, make)`: a path that `make` fills once, even if pytest-xdist runs tests in many processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def path_of(name: str, make: Callable[[Path], None]) -> Path:
        path = folder / name
        with FileLock(folder / f"{name}.lock"):
            if not path.exists():
                make(path)
        return path

    return path_of


def pytest_terminal_summary(terminalreporter):
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" and report.user_properties
    ]
    if not reports:
        return
    terminalreporter.section("measured on GPUs" if torch.cuda.is_available() else "measured in Triton's interpreter")
    if torch.cuda.is_available():
        terminalreporter.write_line(_machine())
    for report in sorted(reports, key=lambda report: report.nodeid):
        values = ", ".join(f"{name} {value:.1e}" for name, value in report.user_properties)
        terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]:<84} {values:<40} {report.outcome}")


def _machine() -> str:
    installed = {name: importlib.util.find_spec(name) is not None for name in ("apex", "transformer_engine")}
    packages = ", ".join(f"{'with' if found else 'without'} {name}" for name, found in installed.items())
    return (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, megatron-core {megatron.core.__version__}, {packages}"
    )
