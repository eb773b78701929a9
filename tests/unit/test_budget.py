"""The limit on memory: what the CPU's counter sees, what it refuses, and what it asks of CUDA's allocator."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from oomph.live.budget import LiveStorages, makes_storages, memory_limit, resident, uncounted
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.meters import CpuMeter
from oomph.live.optimizers import make_optimizer
from oomph.live.step import LOSSES, train_step
from oomph.units import GIB, MIB

CPU = torch.device("cpu")


def block(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


# Counting.


def test_births_and_deaths_are_counted() -> None:
    with memory_limit(None, CPU) as memory:
        first = block(300)
        second = block(200)
        assert memory.allocated_bytes == memory.peak_bytes == 500
        del first
        assert (memory.allocated_bytes, memory.peak_bytes) == (200, 500)
        memory.reset_peak()
        assert memory.peak_bytes == 200
        third = second.view(2, 100)[0].detach()
        del second
        assert memory.allocated_bytes == 200, "a view keeps the storage"
        third.add_(1)
        del third
        assert memory.allocated_bytes == 0
        assert memory.retries == 0


def test_sizes_that_change_are_counted() -> None:
    with memory_limit(None, CPU) as memory:
        grown = block(100)
        grown.resize_(250)
        assert memory.allocated_bytes == 250
        torch.add(block(40), 1, out=grown.resize_(0))
        assert memory.allocated_bytes == 250, "a storage does not become smaller"
        number = torch.tensor([1.0, 2.0])
        assert memory.allocated_bytes == 258
        del number
        lists = torch._foreach_add([torch.zeros(5), torch.zeros(7)], 1.0)
        assert memory.allocated_bytes == 250 + 48
        del lists


def test_what_was_there_before_counts_where_it_is_handed_in() -> None:
    weight, other = block(1000), block(5000)
    with memory_limit(None, CPU, [weight, weight.view(-1)]) as memory:
        assert memory.allocated_bytes == memory.peak_bytes == 1000
        other.add_(1)
        del weight, other
        assert memory.allocated_bytes == 0


def test_what_is_resident_is_found_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    model[0].weight.grad = torch.zeros(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    with memory_limit(None, CPU, resident(model, optimizer)) as memory:
        weights, statistics, states = 16 + 8, 8 + 2, 2 * 16 + 1
        assert memory.allocated_bytes == 4 * (weights + statistics + 16 + states)


def test_the_host_s_own_is_not_counted() -> None:
    with memory_limit(100, CPU) as memory:
        with uncounted():
            large = block(1000)
        assert memory.allocated_bytes == 0
        del large


@pytest.mark.parametrize(
    ("operator", "makes"),
    [
        ("add.Tensor", True),
        ("add_.Tensor", False),
        ("add.out", True),
        ("view.default", False),
        ("split.Tensor", False),
        ("unbind.int", False),
        ("detach.default", False),
        ("lift_fresh.default", True),
        ("resize_.default", True),
        ("set_.source_Storage", True),
        ("_foreach_add.Scalar", True),
        ("_foreach_add_.Scalar", False),
        ("native_layer_norm.default", True),
        ("embedding_dense_backward.default", True),
    ],
)
def test_operators_that_make_storages(operator: str, makes: bool) -> None:
    name, overload = operator.split(".")
    assert makes_storages(getattr(getattr(torch.ops.aten, name), overload)) == makes


@pytest.fixture
def _reproducible() -> Iterator[None]:
    """One thread, since kernels take scratch for each; no oneDNN, whose scratch depends on the CPU; no garbage collector."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    onednn = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    yield
    torch.backends.mkldnn.set_flags(_enabled=onednn)
    gc.enable()
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_reproducible")
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_a_step_takes_what_the_profiler_saw(checkpointing: str) -> None:
    """Forward, backward, recomputation and update: all but the random states that checkpointing keeps without an operator."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).train()
    apply_checkpointing(model, checkpointing, "none")
    optimizer = make_optimizer(model, "adamw-foreach")
    batch = {"input_ids": torch.arange(256).view(2, 128), "labels": torch.arange(256).view(2, 128)}

    def step() -> None:
        train_step(model, optimizer, [lambda: {name: t.clone() for name, t in batch.items()}] * 2, LOSSES["full"], 512)

    step()
    with memory_limit(None, CPU, resident(model, optimizer)) as memory:
        held = memory.allocated_bytes
        step()
        assert memory.allocated_bytes == held
    with CpuMeter() as meter:
        step()
    states = 2 * torch.get_rng_state().nbytes if checkpointing == "blocks" else 0
    seen = meter.footprint().allocated_peak_bytes
    assert 0 <= seen - (memory.peak_bytes - held) <= states
    assert seen > 10 * states


# Refusing.


def test_a_request_beyond_the_limit_is_refused_in_cuda_s_words() -> None:
    with memory_limit(3 * MIB, CPU) as memory:
        kept = block(2 * MIB)
        with pytest.raises(torch.OutOfMemoryError) as refused:
            kept + kept
        assert str(refused.value) == (
            "CPU out of memory. Tried to allocate 2.0 MiB. The memory limit is 3.0 MiB of which 1.0 MiB is free. "
            "Live tensors hold 2.0 MiB."
        )
        assert memory.allocated_bytes == memory.peak_bytes == 2 * MIB, "what was refused is not kept"
        more = block(MIB)
        assert memory.allocated_bytes == 3 * MIB, "the limit itself may be taken"
        del more


def test_the_backward_is_limited_too() -> None:
    weight = torch.ones(64, 64, requires_grad=True)

    def recomputed(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).relu().exp()

    counted = LiveStorages(None, [weight])
    with counted:
        loss = checkpoint(recomputed, weight, use_reentrant=False).sum()
        forward = counted.peak_bytes
        loss.backward()
    assert counted.peak_bytes > forward
    weight.grad = None
    limited = LiveStorages(counted.peak_bytes - 1, [weight])
    with limited:
        loss = checkpoint(recomputed, weight, use_reentrant=False).sum()
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    assert forward <= limited.peak_bytes < counted.peak_bytes


def test_what_exists_may_be_too_much_already() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"The memory limit is 10 B of which 10 B is free"), memory_limit(
        10, CPU, [block(11)]
    ):
        pass


# CUDA.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card of 8 GiB whose allocator was limited to 6 before."""
    card: dict[str, Any] = {"fraction": 0.75, "emptied": 0, "reset": 0}
    statistics = {"allocated_bytes": {"all": {"current": 5, "peak": 7}}, "num_alloc_retries": 3}
    replaced = {
        "get_per_process_memory_fraction": lambda device: card["fraction"],
        "set_per_process_memory_fraction": lambda fraction, device: card.update(fraction=fraction),
        "get_device_properties": lambda device: SimpleNamespace(total_memory=8 * GIB),
        "empty_cache": lambda: card.update(emptied=card["emptied"] + 1),
        "memory_stats_as_nested_dict": lambda device: statistics,
        "reset_peak_memory_stats": lambda device: card.update(reset=card["reset"] + 1),
    }
    for name, function in replaced.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, function)
    return card


def test_cuda_s_allocator_keeps_the_limit(cuda: dict[str, Any]) -> None:
    device = torch.device("cuda", 0)
    for limit in (2 * GIB, 3 * GIB // 7, 1):
        with suppress(KeyError), memory_limit(limit, device) as memory:
            assert int(cuda["fraction"] * (8 * GIB)) == limit
            assert (memory.allocated_bytes, memory.peak_bytes, memory.retries) == (5, 7, 3)
            memory.reset_peak()
            raise KeyError
        assert cuda["fraction"] == 0.75, "the limit ends with the block"
    assert (cuda["emptied"], cuda["reset"]) == (3, 3)
    with memory_limit(7 * GIB, device):
        assert cuda["fraction"] == 0.75, "a limit of the environment is not lifted"
    with memory_limit(None, device) as memory:
        assert memory.peak_bytes == 7
