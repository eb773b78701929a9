"""Running out of memory: what it is told by, what is left of it, and how things are put back."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oomph.live import recover
from oomph.live.optimizers import optimizer_over
from oomph.live.recover import DeviceLostError, Failure, Place, Snapshot, attempt, healthy, kind_of, materialise

CPU = torch.device("cpu")


def out() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


# Told apart.


def accelerator(text: str, code: int | None = None) -> Exception:
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code
    return error


def really(run: Callable[[], object]) -> Exception:
    try:
        run()
    except Exception as error:
        return error
    raise AssertionError


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (out(), "allocator"),
        (torch.cuda.OutOfMemoryError("HIP out of memory."), "allocator"),
        (MemoryError(), "allocator"),
        (really(lambda: torch.empty(1 << 50)), "allocator"),
        (accelerator("CUDA error: out of memory"), "accelerator"),
        (accelerator("CUDA error: out of memory\nCUDA kernel errors might be reported later", 2), "accelerator"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "accelerator"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "accelerator"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "accelerator"),
        (torch.distributed.DistBackendError(NCCL), "accelerator"),
        (accelerator("CUDA error: device-side assert triggered", 710), None),
        (accelerator("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"), None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), None),
        (RuntimeError("the service is out of memory"), None),
        (ValueError("CUDA out of memory"), None),
        (NotImplementedError("CUBLAS_STATUS_ALLOC_FAILED"), None),
        (KeyboardInterrupt(), None),
        (really(lambda: torch.ones(2) @ torch.ones(3)), None),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, BaseException) else str(value),
)
def test_running_out_of_memory_is_told_by_its_type(error: BaseException, kind: str | None) -> None:
    assert kind_of(error) == kind


def test_a_device_that_computes_is_healthy() -> None:
    assert healthy(CPU)
    assert not healthy(torch.device("meta"))


# What is left of a failure.


class Inner(nn.Module):
    """Runs a function in its forward, and keeps what passes through it in a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.do: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        kept = x * self.weight
        return self.do(kept)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return x


@pytest.fixture
def model() -> Outer:
    return Outer()


def raising(error: Exception, times: int = 1) -> Callable[[Tensor], Tensor]:
    """Passes so many tensors on and then raises."""

    def do(x: Tensor) -> Tensor:
        nonlocal times
        times -= 1
        if times < 0:
            raise error
        return x.exp()

    return do


def forward_and_backward(model: nn.Module, place: Place) -> float:
    place("forward", 3)
    loss = model(torch.ones(3)).sum()
    place("backward", 3)
    loss.backward()
    return float(loss.detach())


def test_a_run_that_succeeds_gives_its_result(model: Outer) -> None:
    assert attempt(lambda: 7, model, Place(), CPU) == 7
    result = attempt(lambda: forward_and_backward(model, Place()), model, Place(), CPU)
    assert isinstance(result, float)
    assert model.blocks[0].weight.grad is not None


@pytest.mark.parametrize(("times", "phase"), [(0, "forward"), (1, "recompute")])
def test_a_failure_says_where_it_was(model: Outer, times: int, phase: str) -> None:
    model.blocks[1].do = raising(out(), times)
    place = Place()
    failure = attempt(lambda: forward_and_backward(model, place), model, place, CPU)
    message = "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert failure == Failure("allocator", message, phase, "blocks.1", 3)


def test_the_backward_has_no_module(model: Outer) -> None:
    def in_backward(x: Tensor) -> Tensor:
        x.register_hook(raising(out(), 0))
        return x

    model.eval()
    model.blocks[0].do = in_backward
    place = Place()
    failure = attempt(lambda: forward_and_backward(model, place), model, place, CPU)
    assert isinstance(failure, Failure)
    assert (failure.phase, failure.module) == ("backward", "")


def test_an_exception_without_words_has_its_type_s_name(model: Outer) -> None:
    model.blocks[0].do = raising(MemoryError(), 0)
    failure = attempt(lambda: model(torch.ones(3)), model, Place(), CPU)
    assert isinstance(failure, Failure)
    assert failure.message == "MemoryError"


def test_other_errors_pass(model: Outer) -> None:
    model.blocks[0].do = raising(ValueError("ours"), 0)
    with pytest.raises(ValueError, match="ours"):
        attempt(lambda: model(torch.ones(3)), model, Place(), CPU)


@pytest.mark.parametrize("kept_by_others", [False, True])
def test_nothing_is_left_but_words(model: Outer, kept_by_others: bool) -> None:
    """Frames, graph and gradients go, though something keeps the exception, and though a cycle holds an activation."""
    seen: list[weakref.ref[Tensor]] = []
    exceptions: list[Exception] = []

    def do(x: Tensor) -> Tensor:
        seen.append(weakref.ref(x))
        cycle: list[Any] = [x * 2]
        cycle.append(cycle)
        seen.append(weakref.ref(cycle[0]))
        if len(seen) < 8:
            return x
        try:
            raise out()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError("again") from error

    for block in model.blocks:
        block.do = do

    def run() -> float:
        try:
            forward_and_backward(model, Place())
            return forward_and_backward(model, Place())
        except Exception as error:
            if kept_by_others:
                exceptions.append(error)
            raise

    assert isinstance(attempt(run, model, Place(), CPU), Failure)
    assert len(seen) == 8
    assert [ref() for ref in seen] == [None] * 8
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_accelerator_is_asked_whether_it_still_works(model: Outer, monkeypatch: pytest.MonkeyPatch) -> None:
    model.blocks[0].do = raising(accelerator("CUDA error: out of memory", 2), 0)
    failure = attempt(lambda: model(torch.ones(3)), model, Place(), CPU)
    assert isinstance(failure, Failure)
    assert failure.kind == "accelerator"
    monkeypatch.setattr(recover, "healthy", lambda device: False)
    with pytest.raises(DeviceLostError, match="does not work any more after 'CUDA error: out of memory'") as error:
        attempt(lambda: model(torch.ones(3)), model, Place(), CPU)
    assert "last checkpoint is good" in error.value.hint
    model.blocks[0].do = raising(out(), 0)
    assert isinstance(attempt(lambda: model(torch.ones(3)), model, Place(), CPU), Failure), "the allocator is not asked"


# Putting back.


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_generators_are_put_back() -> None:
    snapshot = Snapshot(nn.Linear(1, 1), CPU)
    snapshot.take()
    first = draws()
    draws()
    snapshot.restore()
    assert draws() == first
    snapshot.take()
    second = draws()
    snapshot.restore()
    assert draws() == second != first


class Mutable(nn.Module):
    """Changes its buffers and numbers in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        for name in ("in_place", "assigned", "data", "constant", "once"):
            self.register_buffer(name, torch.zeros(3))
        self.register_buffer("nothing", None)
        self.calls, self.longest = 0, "none"

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.longest = "some"
        self.in_place += 1
        self.assigned = self.assigned + 1
        self.data.data.add_(1)
        self.register_buffer("new", torch.ones(2), persistent=False)
        if hasattr(self, "once"):
            del self.once
        out: Tensor = self.norm(x)
        return out


def state(model: nn.Module) -> dict[str, Any]:
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    plain = {name: value for m in model.modules() for name, value in vars(m).items() if isinstance(value, int | str)}
    return {**buffers, **plain}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = ((one[name], other[name]) for name in one)
    return one.keys() == other.keys() and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def test_buffers_and_numbers_are_put_back() -> None:
    model = Mutable()
    tensors = dict(model.named_buffers())
    snapshot = Snapshot(model, CPU)
    for _ in range(3):
        snapshot.take()
        before = state(model)
        model(torch.randn(4, 2))
        model(torch.randn(4, 2))
        assert not same(state(model), before)
        snapshot.restore()
        assert same(state(model), before)
    assert all(dict(model.named_buffers())[name] is tensor for name, tensor in tensors.items()), "in place"


def test_a_later_state_is_put_back_too() -> None:
    """Two steps go well; the third does not. What changes without a version is known from the first."""
    model = Mutable()
    snapshot = Snapshot(model, CPU)
    for _ in range(2):
        snapshot.take()
        model(torch.randn(4, 2))
    snapshot.take()
    before = state(model)
    model(torch.randn(4, 2))
    snapshot.restore()
    assert same(state(model), before)
    assert before["calls"] == 2
    assert before["data"].tolist() == [2.0] * 3


def test_what_does_not_change_is_copied_once() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Module())
    model[1].register_buffer("constant", torch.arange(9.0))
    snapshot = Snapshot(model, CPU)
    kept = []
    for _ in range(4):
        snapshot.take()
        kept.append({number: id(known.copies) for number, known in snapshot._buffers.items()})
        model[0](torch.randn(4, 2))
    assert len({seen[2] for seen in kept}) == 1
    assert kept[0][1] != kept[-1][1]


def test_how_blocks_are_recomputed_is_not_put_back() -> None:
    model = nn.Linear(1, 1)
    model.gradient_checkpointing = False
    snapshot = Snapshot(model, CPU)
    snapshot.take()
    model.gradient_checkpointing = True
    snapshot.restore()
    assert model.gradient_checkpointing


def test_gradients_that_were_unscaled_may_be_again() -> None:
    model = nn.Linear(2, 1)
    optimizer = optimizer_over(model.parameters(), "adamw-foreach")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    snapshot = Snapshot(model, CPU, scaler)
    snapshot.take()
    for _ in range(2):
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.unscale_(optimizer)
        assert model.weight.grad is not None
        assert model.weight.grad.tolist() == [[1.0, 1.0]]
        snapshot.restore()
        assert model.weight.grad is None


# States that exist before the first step.

OPTIMIZERS = {
    "adamw-foreach": {},
    "adamw-fused": {},
    "adamw-loop": {},
    "offloaded": {"offload": True},
    "offloaded masters": {"offload": True, "master_weights": True},
    "masters": {"master_weights": True},
    "adamw-8bit": {},
}


def memory_of(optimizer: torch.optim.Optimizer) -> set[int]:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return {value.data_ptr() for value in values if isinstance(value, Tensor)}


def trained(name: str, made_before: bool, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 3)).to(dtype)
    start = deepcopy(model.state_dict())
    kind = name if name.startswith("adamw") else "adamw-foreach"
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[1].parameters(), "weight_decay": 0.5}]
    optimizer = optimizer_over(groups, kind, lr=1e-3, **OPTIMIZERS[name])
    if made_before:
        model[0].weight.grad = torch.ones_like(model[0].weight)
        materialise(optimizer)
        assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
        assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
        assert model[1].weight.grad is None
        model[0].weight.grad = None
        assert set(optimizer.state) == set(model.parameters())
        known = memory_of(optimizer)
    for step in range(3):
        for parameter in list(model.parameters())[: 4 if step else 2]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    if made_before:
        assert memory_of(optimizer) == known, "none is new"
        assert [group["weight_decay"] for group in optimizer.param_groups][1] == 0.5
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_made_before_change_nothing(name: str) -> None:
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    dtype = torch.bfloat16 if "masters" in name else torch.float32
    (one, before), (other, lazily) = trained(name, True, dtype), trained(name, False, dtype)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        mine, his = before.state[ours], lazily.state[theirs]
        assert mine.keys() == his.keys()
        for key, value in mine.items():
            assert torch.equal(value, his[key]) if isinstance(value, Tensor) else value == his[key], key


def test_states_that_are_there_stay() -> None:
    model, optimizer = trained("adamw-foreach", False, torch.float32)
    before = deepcopy(optimizer.state_dict())
    materialise(optimizer)
    for number, state_of_one in optimizer.state_dict()["state"].items():
        for key, value in state_of_one.items():
            assert torch.equal(value, before["state"][number][key])
    assert gc.isenabled()
    assert model is not None
