"""AdamW in host memory: it computes what AdamW does, and the layout says what it leaves on the GPU."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from oomph.core.closed_form import ClosedForm, constant_form
from oomph.core.events import Events, Segment
from oomph.core.layout import Shape, compose, lay_out
from oomph.core.offload import offload_optimizer
from oomph.core.sharding import static_bytes
from oomph.live.masters import MasterWeights
from oomph.live.model import build
from oomph.live.offload import HostOptimizer, host_memory, in_host_memory, to_host
from oomph.live.precision import arithmetic_of
from oomph.live.simulate import Setup, Simulator
from oomph.records import Choice, Optimizer, Precision, Sharding

WHOLE = 1 << 20


# The optimizer.


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 2)).to(dtype)


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups with settings of their own."""
    first, *others = module.children()
    return [{"params": list(first.parameters()), "lr": 1e-2}, {"params": [p for m in others for p in m.parameters()]}]


def differentiate(module: nn.Module, step: int, without: Iterable[int] = ()) -> None:
    """Random gradients, none for some parameters."""
    random = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(module.parameters()):
        gradient = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
        parameter.grad = None if number in without else gradient


def settings(**more: Any) -> dict[str, Any]:
    return {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.95), **more}


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    for mine, theirs in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_parameters_are_those_of_adamw_to_the_bit(dtype: torch.dtype) -> None:
    mine, theirs = model(dtype), model(dtype)
    host = HostOptimizer(groups(mine), **settings())
    plain = torch.optim.AdamW(groups(theirs), **settings(), fused=True)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in (host, plain)]
    where = [parameter.data_ptr() for parameter in mine.parameters()]
    for step, without in enumerate([(), (3,), (0, 5), ()]):
        for module in (mine, theirs):
            differentiate(module, step, without)
        for optimizer, schedule in zip((host, plain), schedules, strict=True):
            optimizer.step()
            schedule.step()
        assert all(parameter.grad is None for parameter in mine.parameters())
        assert_equal(mine, theirs)
    assert [parameter.data_ptr() for parameter in mine.parameters()] == where
    assert not torch.equal(next(mine.parameters()), next(model(dtype).parameters()))


def test_master_weights_on_the_host_are_those_on_the_gpu_to_the_bit() -> None:
    """Also after their states have been taken over from there; float32 parameters are their own masters."""
    mine, theirs = model(torch.bfloat16), model(torch.bfloat16)
    for module in (mine, theirs):
        next(module.children()).to(torch.float32)
    host = HostOptimizer(groups(mine), master_weights=True, **settings())
    plain = MasterWeights(groups(theirs), **settings())
    for step, without in enumerate([(), (3,), ()]):
        for module, optimizer in ((mine, host), (theirs, plain)):
            differentiate(module, step, without)
            optimizer.step()
        assert_equal(mine, theirs)
        host = HostOptimizer(groups(mine), master_weights=True, **settings())
        host.load_state_dict(copy.deepcopy(plain.state_dict()))
    for number, state in plain.state_dict()["state"].items():
        kept = host.state_dict()["state"][number]
        assert kept.keys() == state.keys()
        assert all(torch.equal(kept[name], value) for name, value in state.items())


def test_states_can_be_exchanged_with_adamw() -> None:
    """From the host to the GPU's AdamW, to a new one on the host, and on."""
    mine, theirs = model(), model()
    host = HostOptimizer(groups(mine), **settings())
    differentiate(mine, 0)
    host.step()
    plain = torch.optim.AdamW(groups(theirs), **settings(), fused=True)
    theirs.load_state_dict(mine.state_dict())
    plain.load_state_dict(copy.deepcopy(host.state_dict()))
    again = HostOptimizer(groups(mine), **settings(lr=1.0))
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert [group["lr"] for group in again.param_groups] == [1e-2, 3e-3]
    for step in (1, 2):
        for module, optimizer in ((mine, again), (theirs, plain)):
            differentiate(module, step)
            optimizer.step()
        assert_equal(mine, theirs)
    left, right = again.state_dict(), plain.state_dict()
    assert left["param_groups"] == right["param_groups"]
    for number, state in right["state"].items():
        assert all(torch.equal(left["state"][number][name], value) for name, value in state.items())


def test_loading_states_fetches_the_weights() -> None:
    mine, theirs = model(), model()
    host = HostOptimizer(mine.parameters(), **settings())
    plain = torch.optim.AdamW(theirs.parameters(), **settings(), fused=True)
    for module in (mine, theirs):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(0.5)
    host.load_state_dict(host.state_dict())
    for module, optimizer in ((mine, host), (theirs, plain)):
        differentiate(module, 0)
        optimizer.step()
    assert_equal(mine, theirs)


def test_a_mark_for_host_memory_ends_with_its_block() -> None:
    assert not in_host_memory()
    with host_memory():
        assert in_host_memory()
    with pytest.raises(ZeroDivisionError), host_memory():
        1 / 0  # noqa: B018
    assert not in_host_memory()


# The layout.


def traced(optimizer: Optimizer, offload: bool, precision: Precision = "bfloat16") -> Events:
    """The events of a small Llama on one GPU, all of its layers traced."""
    arithmetic = arithmetic_of(precision)
    config = LlamaConfig(
        vocab_size=503, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2
    )
    setup = Setup("sdpa", "full", optimizer, "none", "none", (8, 0), offload, precision=precision)
    shape = Shape(2, 300, 0)
    model = build(config, arithmetic.frozen, "sdpa")
    arithmetic.lift(model, lambda name: "language")
    trace = Simulator(model, setup, WHOLE, None).trace(shape)
    return compose(constant_form(trace), shape, 3, shape)


def spelt(events: Events) -> list[tuple[Any, ...]]:
    """The segments with what their storages are, in place of the storages' numbers, which count births.

    Ends that follow each other have no order: a scaler of the loss drops what it found after the step, which ends gradients
    on the host and leaves them on the GPU.
    """
    numbers: dict[int, int] = {}
    found = []
    for segment in events.segments:
        entries = []
        for entry in segment.timeline:
            storage = entry if entry >= 0 else ~entry
            if entry >= 0:
                numbers[storage] = len(numbers)
            kind, place = events.kinds[storage], (events.layers[storage], events.parameters[storage])
            entries.append((entry >= 0, numbers[storage], events.sizes[storage], events.shapes[storage], kind, place))
        groups = itertools.groupby(entries, lambda entry: entry[0])
        ordered = [entry for births, run in groups for entry in (run if births else sorted(run))]
        found.append((segment.name, segment.repeat, segment.marks, ordered))
    return found


@pytest.fixture(scope="module")
def real() -> Callable[[Precision], list[tuple[Any, ...]]]:
    """The events of a step with `HostOptimizer`."""
    return functools.cache(lambda precision: spelt(traced("adamw-fused", True, precision)))


@pytest.mark.parametrize("precision", ["bfloat16", "float16-mixed"])
@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw-foreach", "adamw-loop"])
def test_the_layout_is_the_trace_of_the_optimizer(optimizer: Optimizer, precision: Precision, real: Any) -> None:
    """Whatever AdamW would have run on the GPU, since another one runs on the host."""
    plain = traced(optimizer, False, precision)
    before = spelt(plain)
    assert spelt(offload_optimizer(plain)) == real(precision)
    assert before != real(precision)
    assert spelt(plain) == before


def choice(sharding: Sharding, **more: Any) -> Choice:
    gpus = 1 if sharding == "none" else 2
    return Choice(2, 3, 6 * gpus, gpus, sharding=sharding, eval_batch=2, **more)


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("sharding", ["none", "ddp", "fsdp2", "fsdp2-no-reshard"])
def test_states_and_temporaries_are_gone_and_gradients_end(sharding: Sharding, master_weights: bool, toy: ClosedForm) -> None:
    wanted = choice(sharding, optimizer_offload=True, master_weights=master_weights and sharding.startswith("fsdp2"))
    events = lay_out(toy, wanted, 96, 1)
    plain = lay_out(toy, replace(wanted, optimizer_offload=False), 96, 1)
    after = resident(events, ("load", "warmup/"))
    assert after == {storage for storage in resident(plain, ("load", "warmup/")) if plain.kinds[storage].role != "optimizer"}
    assert resident(events, ("load", "warmup/", "step/")) == after
    for segment in events.segments:
        same = next(other for other in plain.segments if other.name == segment.name)
        if not segment.name.endswith("/optimizer"):
            assert segment == same
            continue
        (norm,) = [entry for entry in segment.timeline if entry >= 0 and events.kinds[entry].op == "aten.temporary.default"]
        assert norm == next(entry for entry in same.timeline if entry >= 0)
    assert static_bytes(toy.parameters, wanted)["optimizer"] == 0


def resident(events: Events, names: tuple[str, ...]) -> set[int]:
    """What lives after the segments whose names begin so; each storage dies when it is alive."""
    living = set[int]()
    for segment in repeated(events.segments, names):
        for entry in segment.timeline:
            if entry >= 0:
                living.add(entry)
            else:
                living.remove(~entry)
    return living


def repeated(segments: Iterable[Segment], names: tuple[str, ...]) -> Iterable[Segment]:
    return [segment for segment in segments if segment.name.startswith(names) for _ in range(segment.repeat)]


def test_nothing_trained_is_left_as_it_is(toy: ClosedForm) -> None:
    """A step whose optimizer makes no states has nothing to drop."""
    events = compose(toy, Shape(2, 96, 2), 2, None)
    states = {storage for storage, kind in enumerate(events.kinds) if kind.role == "optimizer"}
    events.segments = [replace(s, timeline=[e for e in s.timeline if e not in states], marks=()) for s in events.segments]
    assert spelt(offload_optimizer(events)) == spelt(events)


def test_tensors_on_the_host_have_no_gradient_graph() -> None:
    host: Tensor = to_host(torch.ones(3, requires_grad=True) * 2)
    assert host.grad_fn is None
    assert not host.requires_grad
