"""Master weights: the optimizer is AdamW on float32 copies, and the layout is what it allocates when it is traced."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig

from oomph.core.allocator import Allocator, replay
from oomph.core.closed_form import ClosedForm, constant_form
from oomph.core.events import Events, Kind, Segment
from oomph.core.layout import Shape, lay_out
from oomph.core.masters import add_masters
from oomph.core.sharding import static_bytes
from oomph.core.trace import Parameter
from oomph.core.unroll import UNITS
from oomph.live import simulate
from oomph.live.batch import images_of
from oomph.live.masters import MasterWeights
from oomph.live.model import build, compose_llava
from oomph.live.simulate import Setup, Simulator
from oomph.live.step import commit
from oomph.live.trace import Recorder
from oomph.records import Choice, Optimizer, PhasePeak, Request, Sharding

VARIANTS: list[Optimizer] = ["adamw-fused", "adamw-foreach", "adamw-loop"]
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.99), "weight_decay": 0.1}
WHOLE = 1 << 20


# The optimizer.


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """A matrix, a vector and a number in bfloat16, and a matrix in float32."""
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=random) for shape in [(7, 5), (5,), (), (3, 4)]]
    return [nn.Parameter(tensor.bfloat16() if n < 3 else tensor) for n, tensor in enumerate(made)]


def give_gradients(trained: list[nn.Parameter], step: int) -> None:
    """Gradients in the parameters' dtypes; every third step gives the second parameter none."""
    random = torch.Generator().manual_seed(100 + step)
    for number, parameter in enumerate(trained):
        gradient = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
        parameter.grad = None if number == 1 and step % 3 == 2 else gradient


def optimizer(trained: list[nn.Parameter], variant: str) -> MasterWeights:
    return MasterWeights(trained, variant.removeprefix("adamw-"), **SETTINGS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trajectory_is_that_of_adamw_on_float32_copies(variant: Optimizer) -> None:
    ours, theirs = parameters(), parameters()
    kind: dict[str, Any] = {"foreach": variant == "adamw-foreach", "fused": variant == "adamw-fused"}
    masters = [theirs_.detach().clone().float() for theirs_ in theirs]
    adamw, own = torch.optim.AdamW(masters, **kind, **SETTINGS), optimizer(ours, variant)
    for step in range(12):
        adamw.param_groups[0]["lr"] = own.param_groups[0]["lr"] = 3e-3 / (step + 1)
        give_gradients(ours, step)
        commit(own)
        give_gradients(theirs, step)
        nn.utils.clip_grad_norm_(theirs, 1.0)
        for master, parameter in zip(masters, theirs, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        adamw.step()
        for ours_, master in zip(ours, masters, strict=True):
            assert torch.equal(ours_, master.to(ours_.dtype))
            assert torch.equal(own.state[ours_].get("master", ours_), master)
            assert ours_.grad is None
            assert ours_.requires_grad


def test_what_is_too_small_for_bfloat16_adds_up() -> None:
    ours, theirs = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    own, plain = (
        kind([weight], lr=1e-4, weight_decay=0.0) for kind, weight in ((MasterWeights, ours), (torch.optim.AdamW, theirs))
    )
    for _ in range(100):
        for weight, optimizer in ((ours, own), (theirs, plain)):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    torch.testing.assert_close(own.state[ours]["master"], torch.full((4,), 1 - 100 * 1e-4))
    assert torch.equal(ours, own.state[ours]["master"].bfloat16())
    assert torch.equal(theirs, torch.ones_like(theirs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_are_there_before_the_first_step(variant: Optimizer) -> None:
    trained = parameters()
    own = optimizer(trained, variant)
    for parameter in trained:
        state = own.state[parameter]
        assert sorted(state) == sorted(["exp_avg", "exp_avg_sq", "step"] + ["master"] * (parameter.dtype == torch.bfloat16))
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert torch.equal(state.get("master", parameter), parameter.float())
    before = {id(tensor) for state in own.state.values() for tensor in state.values()}
    give_gradients(trained, 0)
    own.step()
    assert {id(tensor) for state in own.state.values() for tensor in state.values()} == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_state_goes_on_where_it_was(variant: Optimizer) -> None:
    first, second = parameters(), parameters(1)
    own, other = optimizer(first, variant), optimizer(second, variant)
    for step in range(3):
        give_gradients(first, step)
        own.step()
    own.param_groups[0]["lr"] = 1e-2
    saved = copy.deepcopy(own.state_dict())
    with torch.no_grad():
        second[3].copy_(first[3])
    other.load_state_dict(saved)
    for step in range(3, 6):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for trained, stepped in ((first, own), (second, other)):
            give_gradients(trained, step)
            stepped.step()
    assert all(torch.equal(a, b) for a, b in zip(leaves(own), leaves(other), strict=True))
    assert [torch.equal(a, b) for a, b in zip(leaves(saved["state"]), leaves(own), strict=True)].count(False) > 0


def leaves(states: Any) -> list[Tensor]:
    by_parameter = states.state if isinstance(states, MasterWeights) else states
    return [tensor for state in by_parameter.values() for tensor in state.values()]


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.permutations(VARIANTS, 2)))
def test_a_saved_state_may_be_another_variants(saved: Optimizer, loaded: Optimizer) -> None:
    first, second = parameters(), parameters()
    own, other = optimizer(first, saved), optimizer(second, loaded)
    give_gradients(first, 0)
    own.step()
    other.load_state_dict(own.state_dict())
    for trained, stepped in ((first, own), (second, other)):
        give_gradients(trained, 1)
        stepped.step()
    assert other.param_groups[0]["fused"] == (loaded == "adamw-fused")
    for a, b in zip(leaves(own), leaves(other), strict=True):
        torch.testing.assert_close(a, b)


def test_states_of_others_are_refused() -> None:
    own, plain = optimizer(parameters(), "adamw-loop"), torch.optim.AdamW(parameters())
    before = copy.deepcopy(own.state_dict()["state"])
    fewer = optimizer(parameters()[1:], "adamw-loop")
    for other in (plain, fewer):
        with pytest.raises(ValueError, match="not those of master weights"):
            own.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(leaves(own), leaves(before), strict=True))


# The layout.


SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}


def llama(layers: int = 1) -> PretrainedConfig:
    return LlamaConfig(vocab_size=503, num_key_value_heads=2, num_hidden_layers=layers, **SIZES)


def deep() -> PretrainedConfig:
    """Deep enough for layers to be left out of a trace."""
    return llama(UNITS + 1)


def llava() -> PretrainedConfig:
    """The tower's last layer is trained, and nothing uses it."""
    return compose_llava(CLIPVisionConfig(**SIZES, num_hidden_layers=2, image_size=56, patch_size=14), llama(), -2, "patch")


class Reviving(Recorder):
    """Gives no gradient to a parameter that never had one."""

    def revive(self, index: int, parameter: Tensor) -> None:
        if any(row.parameter == index and row.kind.role == "gradient" for row in self.trace.storages):
            super().revive(index, parameter)


@functools.cache
def plain(config: Callable[[], PretrainedConfig], dtype: torch.dtype, variant: Optimizer, units: int) -> ClosedForm:
    """The form with the optimizer that updates the parameters themselves."""
    return traced(config, dtype, variant, units)


def traced(config: Callable[[], PretrainedConfig], dtype: torch.dtype, variant: Optimizer, units: int) -> ClosedForm:
    """The form of a small model at `shape_of(config)` alone."""
    model = build(config(), dtype, "sdpa")
    setup = Setup("sdpa", "full", variant, "none", "none", (8, 0))
    images = images_of(config(), None) if config is llava else None
    return constant_form(Simulator(model, setup, units, images).trace(shape_of(config)))


def shape_of(config: Callable[[], PretrainedConfig]) -> Shape:
    return Shape(2, 64, 2 if config is llava else 0)


def sequence(events: Events) -> list[tuple[Any, ...]]:
    """The segments with the bytes of each birth, and which birth each death belongs to."""
    births, number, found = itertools.count(), dict[int, int](), []
    for segment in events.segments:
        made: list[tuple[str, int]] = []
        for entry in segment.timeline:
            if entry >= 0:
                number[entry] = next(births)
                made.append(("birth", events.sizes[entry]))
            else:
                made.append(("death", number.pop(~entry)))
        found.append((segment.name, segment.repeat, segment.marks, made))
    return found


@pytest.mark.parametrize(
    ("config", "dtype", "variant", "units"),
    [
        (deep, torch.bfloat16, "adamw-foreach", UNITS),
        (llama, torch.bfloat16, "adamw-loop", WHOLE),
        (llama, torch.float32, "adamw-foreach", WHOLE),
        (llava, torch.bfloat16, "adamw-fused", WHOLE),
    ],
)
def test_the_layout_is_a_trace_of_the_optimizer(
    config: Callable[[], PretrainedConfig],
    dtype: torch.dtype,
    variant: Optimizer,
    units: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice = Choice(2, 3, 6, optimizer=variant, eval_batch=2)
    images = shape_of(config).images // 2
    form = plain(config, dtype, variant, units)
    laid = lay_out(form, replace(choice, master_weights=True), 64, images)
    monkeypatch.setattr(simulate, "Recorder", Reviving)
    monkeypatch.setattr(simulate, "make_optimizer", functools.partial(_masters, variant))
    expected = lay_out(traced(config, dtype, variant, WHOLE), choice, 64, images)
    for ours, theirs in zip(sequence(laid), sequence(expected), strict=True):
        assert ours == theirs
    assert peaks(laid) == peaks(expected) != peaks(lay_out(form, choice, 64, images))


def peaks(events: Events) -> tuple[PhasePeak, ...]:
    return replay(events.sizes, events.segments, Allocator()).phases


def _masters(variant: str, model: nn.Module, kind: str, offload: bool = False) -> MasterWeights:
    assert kind == variant
    assert not offload
    return MasterWeights(list(model.parameters()), variant.removeprefix("adamw-"))


def test_without_clipping_the_optimizer_begins_with_the_first_gradient() -> None:
    events = Events()
    kinds = [("load", "weight"), ("backward", "gradient"), ("optimizer", "optimizer"), ("optimizer", "optimizer")]
    weight, gradient, *moments = (events.add(16, (4, 2), Kind("op", "fc", *kind, "bfloat16"), -1, 0) for kind in kinds)
    steps = {"load": [weight], "warmup/first": [gradient], "warmup/optimizer": [*moments, ~gradient]}
    steps |= {"step/first": [gradient], "step/optimizer": [~gradient]}
    events.segments = [Segment(name, timeline, ((0, name),)) for name, timeline in steps.items()]
    choice = Choice(1, 1, 1, optimizer="adamw-fused", master_weights=True)
    out = add_masters(events, [Parameter("fc.weight", (4, 2), "bfloat16", True)], choice)
    for segment in (out.segments[2], out.segments[4]):
        float32 = segment.timeline[0]
        assert out.request(float32) == Request(32, (4, 2), "float32", "masters.gradient", "fc", "optimizer", "gradient")
        assert segment.timeline == [float32, ~gradient, ~float32]
        assert segment.marks == ((0, segment.name),)


@functools.cache
def form(variant: Optimizer) -> ClosedForm:
    """Of a model one of whose layers is trained without a gradient."""
    return plain(llava, torch.bfloat16, variant, WHOLE)


def asked(variant: Optimizer, sharding: Sharding = "none", offload: bool = False, masters: bool = True) -> Choice:
    gpus = 1 if sharding == "none" else 2
    knobs: dict[str, Any] = {"optimizer": variant, "optimizer_offload": offload, "master_weights": masters}
    return Choice(2, 2, 4 * gpus, gpus, sharding=sharding, **knobs)


def alive(events: Events, until: str) -> set[int]:
    """The storages that live when a segment begins."""
    living = set[int]()
    for segment in itertools.takewhile(lambda segment: segment.name != until, events.segments):
        for entry in segment.timeline:
            (living.add if entry >= 0 else living.remove)(entry if entry >= 0 else ~entry)
    return living


@pytest.mark.parametrize("sharding", ["none", "ddp"])
@pytest.mark.parametrize("variant", ["adamw-fused", "adamw-foreach"])
def test_resident_bytes_agree_with_the_closed_arithmetic(variant: Optimizer, sharding: Sharding) -> None:
    choice, known = asked(variant, sharding), form(variant)
    events = lay_out(known, choice, 64, 1)
    made = [s for s, kind in enumerate(events.kinds) if (kind.role, kind.phase) == ("gradient", "backward")]
    reached = {events.parameters[storage] for storage in made}
    kept = Counter[str]()
    for storage in alive(events, "step/optimizer"):
        if events.parameters[storage] >= 0 or events.kinds[storage].role == "communication":
            kept[events.kinds[storage].role] += events.sizes[storage]
    assert kept == Counter(static_bytes(known.parameters, choice, reached=reached))
    trained = [parameter for parameter in known.parameters if parameter.trainable]
    assert len(reached) < len(trained)
    counters = 4 * len(trained) if variant == "adamw-fused" else 0
    assert kept["optimizer"] == 12 * sum(parameter.numel for parameter in trained) + counters


def test_masters_come_after_the_buckets_of_ddp() -> None:
    events = lay_out(form("adamw-fused"), asked("adamw-fused", "ddp"), 64, 1)
    plain = lay_out(form("adamw-fused"), asked("adamw-fused", "ddp", masters=False), 64, 1)
    load, before = (list(events_.segments[0].timeline) for events_ in (events, plain))
    assert load[: len(before)] == before
    added = load[len(before) :]
    assert {events.kinds[storage].op for storage in added} == {
        f"masters.{w}" for w in ("weight", "step", "exp_avg", "exp_avg_sq")
    }
    assert all(events.module(s) == events.module(events.parameters.index(events.parameters[s])) for s in added)


@pytest.mark.parametrize("sharding", ["none", "ddp"])
def test_in_host_memory_nothing_is_left_of_them(sharding: Sharding) -> None:
    known = form("adamw-foreach")
    choices = [asked("adamw-foreach", sharding, True, masters) for masters in (True, False)]
    with_masters, without = (sequence(lay_out(known, choice, 64, 1)) for choice in choices)
    assert with_masters == without
    assert static_bytes(known.parameters, choices[0])["optimizer"] == 0
