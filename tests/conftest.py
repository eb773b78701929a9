"""What every test gets: no network, a cache of its own, no deadlines, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

from oomph.core.forms import FormKey

# A deadline would assert seconds, and "too slow" is a matter of the machine.
hypothesis.settings.register_profile("oomph", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("oomph")

# Read when transformers and huggingface_hub are imported, which collecting the tests already does.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def plain_key() -> FormKey:
    """What a form of a text model is made from that trains whole; tests name the model, and replace the rest."""
    return FormKey(
        model=None,
        vision=None,
        language=None,
        projector=None,
        vision_feature_layer=0,
        vision_feature_select="",
        experts="",
        balance="",
        lora="",
        quantization="",
        trained=("language", "head"),
        frozen=(),
        attention="sdpa",
        loss="full",
        optimizer="adamw-fused",
        checkpointing="none",
        vision_checkpointing="none",
        precision="bfloat16",
        capability=(8, 0),
        image_size=(),
        one_sample=False,
        images=0,
    )


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Traces are cached where no earlier run and no other checkout has left any; processes of one run share them.

    What was measured on this machine is nobody's business here, so there is no such file either.
    """
    own = tmp_path_factory.getbasetemp()
    os.environ["XDG_CONFIG_HOME"] = str(own / "config")
    os.environ["XDG_CACHE_HOME"] = str((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache")


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """Also where a shell has started the tests in its background, and with them every program that a test interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked ``gpu`` where torch finds no CUDA GPU."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
