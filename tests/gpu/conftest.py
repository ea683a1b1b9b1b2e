"""Everything below runs on a GPU, or is skipped."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(skip)
