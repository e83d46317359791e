import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, also in its subprocesses; torch reads this when imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Memory that nobody has written holds NaN, so that a result which depends on it cannot pass by luck."""
    # `with torch.device(...)` recognises constructors from a list that it makes once: before we replace two of them.
    torch.utils._device._device_constructors()

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.dtype in FLOATS:
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real books and other data beside the repository, which a clone alone does not have."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}, which is not part of the repository")
    return folder
