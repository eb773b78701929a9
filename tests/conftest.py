"""What every test gets: no network, a cache of its own, no deadlines, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# A deadline would assert seconds, and "too slow" is a matter of the machine.
hypothesis.settings.register_profile("oomph", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("oomph")

# Read when transformers and huggingface_hub are imported, which collecting the tests already does.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Traces are cached where no earlier run and no other checkout has left any; processes of one run share them."""
    own = tmp_path_factory.getbasetemp()
    os.environ["XDG_CACHE_HOME"] = str((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked ``gpu`` where torch finds no CUDA GPU."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
