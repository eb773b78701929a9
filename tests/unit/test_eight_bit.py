"""States of 8 bits: the trace is what bitsandbytes makes, and the arithmetic, the layout and the advice agree with it."""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from oomph.core.allocator import Allocator, replay
from oomph.core.bounds import Bounds
from oomph.core.closed_form import constant_form
from oomph.core.devices import find_gpu
from oomph.core.eight_bit import EIGHT_BIT, same_states, state_bytes
from oomph.core.events import Events
from oomph.core.fit import smallest_cards
from oomph.core.forms import FormKey, Traced
from oomph.core.layout import Shape, lay_out
from oomph.core.predict import leaves_out
from oomph.core.sharding import static_bytes
from oomph.core.stage import StageModel
from oomph.core.suggest import suggestions
from oomph.core.trace import Parameter, Trace
from oomph.core.unroll import UNITS
from oomph.errors import UserError
from oomph.live.eight_bit import on_a_gpu
from oomph.live.masters import MasterWeights
from oomph.live.model import build
from oomph.live.offload import HostOptimizer
from oomph.live.optimizers import make_optimizer, optimizer_over, states_of
from oomph.live.simulate import Setup, Simulator
from oomph.live.source import make_form
from oomph.live.step import LOSSES, train_step
from oomph.recipe import Recipe
from oomph.records import Choice, Optimizer

WHOLE = 1 << 20
SHAPE = Shape(2, 64, 0)
LAYERS = UNITS + 2
BIG = 100_000
"""Elements from which a paged state is in managed memory."""
SIZES: dict[str, Any] = {"vocab_size": 1600, "hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
"""Attention's small matrices have less than 4096 elements, the others more, embedding and head more than `BIG`."""


def llama(layers: int = LAYERS, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return build(LlamaConfig(num_hidden_layers=layers, **SIZES), dtype, "sdpa")


def simulator(optimizer: str, units: int = WHOLE, layers: int = LAYERS, frozen: Sequence[str] = ()) -> Simulator:
    model = llama(layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(word in name for word in frozen))
    return Simulator(model, Setup("sdpa", "full", optimizer, "none", "none", (8, 0)), units, None)


@functools.cache
def traced(optimizer: str, units: int = WHOLE, frozen: tuple[str, ...] = ()) -> Trace:
    return simulator(optimizer, units, frozen=frozen).trace(SHAPE)


def sizes_of(tensors: Sequence[Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    return sorted((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in tensors)


# What bitsandbytes makes.


def really_trained(steps: int) -> tuple[PreTrainedModel, torch.optim.Optimizer, list[float]]:
    """A model that has learned a few tokens on the CPU, and its losses."""
    torch.manual_seed(0)
    meta = llama(layers=1, dtype=torch.float32)
    model = type(meta)(meta.config).train()
    optimizer = optimizer_over(list(model.parameters()), "adamw-8bit", lr=3e-3)
    ids = torch.randint(0, 1600, SHAPE[:2])
    losses = []
    for _ in range(steps):
        loss = train_step(model, optimizer, [lambda: {"input_ids": ids, "labels": ids}], LOSSES["full"], ids.numel())
        losses.append(float(loss))
    return model, optimizer, losses


def test_a_real_step_makes_the_states_that_are_traced() -> None:
    model, optimizer, losses = really_trained(8)
    assert losses[-1] < losses[0] - 1
    trace = simulator("adamw-8bit", layers=1).trace(SHAPE)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    numbers = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    shared = [tensor for number, tensor in states_of(optimizer, numbers) if number == -1]
    assert sizes_of(list({id(tensor): tensor for tensor in shared}.values())) == [("float32", (256,))] * 2
    rows = [row for row in trace.storages if row.kind.role == "optimizer"]
    assert sorted((row.kind.dtype, row.shape) for row in rows if row.parameter == -1) == [("float32", (256,))] * 2
    for parameter, state in optimizer.state.items():
        tensors = [tensor for tensor in state.values() if isinstance(tensor, Tensor)]
        own = [tensor for tensor in tensors if all(tensor is not other for other in shared)]
        found = [row for row in rows if row.parameter >= 0 and trace.parameters[row.parameter].name == names[id(parameter)]]
        assert sorted((row.kind.dtype, row.shape) for row in found) == sizes_of(own)
        assert sum(row.nbytes for row in found) == sum(tensor.nbytes for tensor in own)
        assert {row.kind.module.replace("{}", "0") for row in found} == {names[id(parameter)].rpartition(".")[0]}


def test_every_parameter_has_its_states_and_nothing_else_is_made() -> None:
    trace = traced("adamw-8bit")
    rows = [row for row in trace.storages if row.kind.role == "optimizer"]
    per_parameter = [sum(row.parameter == number for row in rows) for number in range(len(trace.parameters))]
    assert per_parameter == [4 if parameter.numel >= 4096 else 2 for parameter in trace.parameters]
    assert not trace.unclassified
    plain = traced("adamw-fused")
    assert [row.kind.op for row in others(trace)] == [row.kind.op for row in others(plain)]


def others(trace: Trace) -> list[Any]:
    return [row for row in trace.storages if row.kind.phase == "optimizer" and row.kind.role != "optimizer"]


def test_paged_states_are_not_the_allocators() -> None:
    """Their maxima and the maps are, and so are the states of tensors of fewer than 100,000 elements."""
    whole, paged = traced("adamw-8bit"), traced("adamw-8bit-paged")
    large = {number for number, parameter in enumerate(whole.parameters) if parameter.numel >= BIG}
    assert {whole.parameters[number].name for number in large} == {"model.embed_tokens.weight", "lm_head.weight"}

    def states(trace: Trace) -> list[tuple[Any, ...]]:
        rows = [row for row in trace.storages if row.kind.role == "optimizer"]
        return [(row.kind, row.shape, row.parameter) for row in rows]

    kept = [state for state in states(whole) if not (state[2] in large and state[0].dtype == "uint8")]
    assert states(paged) == kept
    assert len(states(whole)) == len(kept) + 2 * len(large)
    pages: Any = functional.GlobalPageManager
    assert pages.get_instance().paged_tensors == []


def test_paged_states_move_nothing_but_what_the_kernel_does() -> None:
    whole, paged = traced("adamw-8bit"), traced("adamw-8bit-paged")
    assert paged.operations == whole.operations


def test_the_kernel_reads_what_it_does_not_change() -> None:
    """Gradient and maps once; weight, states and maxima twice."""
    trace = traced("adamw-8bit")
    (head,) = (parameter for parameter in trace.parameters if parameter.name == "lm_head.weight")
    moved = [
        sum(map(math.prod, operation.traffic))
        for operation in trace.operations
        if operation.name == "bitsandbytes.optimizer_update_8bit_blockwise.default"
    ]
    elements = head.numel
    assert moved[-1] == 2 * elements + 2 * 2 * elements + 2 * 2 * elements + 2 * 2 * 4 * (elements // 256) + 2 * 1024


# The arithmetic.


shapes = st.lists(st.integers(1, 300_000), min_size=1, max_size=5)


@settings(max_examples=30)
@given(shapes, st.sampled_from(EIGHT_BIT))
@example([4095, 4096, 4097, 99_999, 100_000], "adamw-8bit-paged")
@example([4095], "adamw-8bit")
def test_the_bytes_of_states_are_those_that_are_made(elements: list[int], optimizer: Optimizer) -> None:
    """By bitsandbytes' own ``init_state``; managed memory is counted where it is handed out."""
    with on_a_gpu(optimizer):
        trained = [nn.Parameter(torch.empty(n, dtype=torch.bfloat16)) for n in elements]
        own: Any = optimizer_over(trained, optimizer, lr=1e-3)
        for number, parameter in enumerate(trained):
            own.init_state(own.param_groups[0], parameter, 0, number)
    numbers = {id(parameter): number for number, parameter in enumerate(trained)}
    made = {id(tensor): tensor for _, tensor in states_of(own, numbers) if not hasattr(tensor, "is_paged")}
    parameters = [Parameter(f"p{n}", (n,), "bfloat16", True) for n in elements]
    assert state_bytes(parameters, optimizer) == sum(tensor.nbytes for tensor in made.values())


@pytest.mark.parametrize("optimizer", EIGHT_BIT)
@pytest.mark.parametrize("frozen", [(), ("embed", "lm_head")])
def test_resident_bytes_are_those_of_the_trace(optimizer: Optimizer, frozen: tuple[str, ...]) -> None:
    trace = traced(optimizer, WHOLE, frozen)
    choice = Choice(2, 1, 2, optimizer=optimizer)
    held = sum(row.nbytes for row in trace.storages if row.kind.role == "optimizer")
    assert static_bytes(trace.parameters, choice)["optimizer"] == held
    form = constant_form(trace)
    peak = replay_of(lay_out(form, choice, SHAPE.tokens, 0)).peak_allocated
    assert 0.9 * peak <= Bounds(form).least_bytes(choice, SHAPE) <= peak


def replay_of(events: Events) -> Any:
    return replay(events.sizes, events.segments, Allocator())


def test_ddp_keeps_the_states_of_each_gpu() -> None:
    form = constant_form(traced("adamw-8bit"))
    alone = Choice(2, 1, 2, optimizer="adamw-8bit")
    shared = replace(alone, effective_batch=4, gpus=2, sharding="ddp")
    one, two = (lay_out(form, choice, SHAPE.tokens, 0) for choice in (alone, shared))

    def states(events: Events) -> list[Any]:
        return [events.request(n) for n, kind in enumerate(events.kinds) if kind.role == "optimizer"]

    assert states(one) == states(two)


# Depth and shape.


def sequence(events: Events) -> list[tuple[Any, ...]]:
    """The segments with each birth's request, layer and parameter, and which birth each death belongs to."""
    births, number, found = itertools.count(), dict[int, int](), []
    for segment in events.segments:
        made: list[tuple[Any, ...]] = []
        for entry in segment.timeline:
            if entry >= 0:
                number[entry] = next(births)
                made.append((events.request(entry), events.parameters[entry]))
            else:
                made.append((number.pop(~entry),))
        found.append((segment.name, segment.repeat, segment.marks, made))
    return found


@pytest.mark.parametrize(
    ("optimizer", "frozen"),
    [("adamw-8bit", ("embed", "lm_head")), ("adamw-8bit-paged", ())],
    ids=["a layer first", "the embedding first"],
)
def test_a_few_layers_are_all_layers(optimizer: Optimizer, frozen: tuple[str, ...]) -> None:
    """Also where the first layer is where the maps are made."""
    choice = Choice(2, 2, 4, optimizer=optimizer, eval_batch=2)
    few, whole = (constant_form(traced(optimizer, units, frozen)) for units in (UNITS, WHOLE))
    assert few.parameters == whole.parameters
    assert sequence(lay_out(few, choice, SHAPE.tokens, 0)) == sequence(lay_out(whole, choice, SHAPE.tokens, 0))
    works = [sorted(form.work.rows) for form in (few, whole)]
    assert sum(row.times for row in works[0]) == sum(row.times for row in works[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    path = tmp_path_factory.mktemp("llama")
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, **SIZES, "max_position_embeddings": 4096}
    (path / "config.json").write_text(json.dumps(config))
    return path


class Forms:
    """Makes each form once."""

    def __init__(self) -> None:
        self.made: dict[FormKey, Traced] = {}

    def traced(self, key: FormKey) -> Traced:
        if key not in self.made:
            self.made[key] = make_form(key)
        return self.made[key]

    def prepare(self, keys: Sequence[FormKey]) -> None:
        for key in keys:
            self.traced(key)


@pytest.fixture(scope="module")
def forms() -> Forms:
    return Forms()


def stage(model: str | Path, forms: Any, optimizer: str) -> StageModel:
    memory = {"micro_batch": 4, "eval_batch": "none", "checkpointing": "blocks", "loss": "full", "optimizer": optimizer}
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "model": str(model),
            "data": {"max_tokens": 700},
            "hardware": {"gpu": "A100-SXM4-40GB"},
            "memory": memory,
            "stages": [{"name": "tune", "train": {"language": 1e-4, "head": 1e-4}, "effective_batch": 4}],
        }
    )
    return StageModel(recipe, recipe.stages[0], find_gpu("A100-SXM4-40GB"), forms)


def test_the_form_is_closed_and_holds_at_another_shape(folder: Path, forms: Forms) -> None:
    model = stage(folder, forms, "adamw-8bit")
    laid = model.lay_out(model.first)
    assert laid.traced.how.startswith("closed form of 2 traces, checked on one more shape and depth")
    assert not laid.form.work.note
    (key,) = model.first_keys()
    whole = make_form(replace(key, shape=(4, 700, 0))).form
    assert whole is not None
    assert sequence(laid.events) == sequence(lay_out(whole, model.first, 700, 0))


def test_what_is_suggested_is_what_it_saves(folder: Path, forms: Forms) -> None:
    """Byte by byte of what is asked for; the allocator rounds each of the many small states here to 512 bytes."""
    plain, smaller = stage(folder, forms, "adamw-fused"), stage(folder, forms, "adamw-8bit")
    before, after = plain.predict(plain.first), smaller.predict(smaller.first)
    (found,) = (one for one in suggestions(plain, plain.first, before) if one.name == "8-bit optimizer")
    assert found.saves_bytes == asked_for(plain) - asked_for(smaller)
    saved = before.allocated_peak_bytes - after.allocated_peak_bytes
    assert saved == before.by_role["optimizer"] - after.by_role["optimizer"]
    assert saved == pytest.approx(found.saves_bytes, rel=0.01)
    assert not any(one.name == "8-bit optimizer" for one in suggestions(smaller, smaller.first, after))


def asked_for(model: StageModel) -> int:
    events = model.lay_out(model.first).events
    return sum(size for size, kind in zip(events.sizes, events.kinds, strict=True) if kind.role == "optimizer")


def test_the_smallest_cards_keep_the_bits_of_the_states(by_hand: Any) -> None:
    model = stage("llama-3.1-8b", by_hand(), "adamw-8bit")
    cards = smallest_cards(model, model.first)
    assert cards
    for card in cards:
        assert card.choice.optimizer == "adamw-8bit-paged"
        assert card.choice.sharding in ("none", "ddp")
        assert not card.choice.optimizer_offload


def test_a_prediction_says_that_managed_memory_is_left_out() -> None:
    lines = {kind: leaves_out(Choice(1, 1, 1, optimizer=kind), ()) for kind in ("adamw-fused", *EIGHT_BIT)}
    assert lines["adamw-8bit"] == lines["adamw-fused"]
    (line,) = set(lines["adamw-8bit-paged"]) - set(lines["adamw-8bit"])
    assert "managed memory" in line


# Which optimizer it is.


def test_one_function_makes_every_optimizer() -> None:
    def made(kind: str, **more: Any) -> torch.optim.Optimizer:
        return optimizer_over([{"params": [nn.Parameter(torch.ones(8))], "lr": 3e-3}], kind, weight_decay=0.5, **more)

    plain = {kind: made(f"adamw-{kind}") for kind in ("fused", "foreach", "loop")}
    assert {kind: (one.defaults["fused"], one.defaults["foreach"]) for kind, one in plain.items()} == {
        "fused": (True, False),
        "foreach": (False, True),
        "loop": (False, False),
    }
    masters, host = made("adamw-fused", master_weights=True), made("adamw-fused", offload=True, master_weights=True)
    assert isinstance(masters, MasterWeights)
    assert isinstance(host, HostOptimizer)
    small = made("adamw-8bit")
    assert (type(small).__module__, type(small).__name__) == ("bitsandbytes.optim.adamw", "AdamW8bit")
    for one in (*plain.values(), masters, host, small):
        assert (one.param_groups[0]["lr"], one.param_groups[0]["weight_decay"]) == (3e-3, 0.5)
    with pytest.raises(AssertionError, match=r"choices\.clashes"):
        made("adamw-8bit", master_weights=True)


def test_only_what_trains_is_updated() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert [group["params"] for group in make_optimizer(model, "adamw-8bit").param_groups] == [[model.weight]]


@pytest.mark.parametrize("optimizer", EIGHT_BIT)
def test_a_missing_library_is_named_with_the_extra(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    small = simulator(optimizer, layers=1)
    for use in (lambda: optimizer_over([nn.Parameter(torch.ones(2))], optimizer), lambda: small.trace(SHAPE)):
        with pytest.raises(UserError) as caught:
            use()
        assert caught.value.problems == [f"optimizer {optimizer} is bitsandbytes', which is not installed"]
        assert "oomph[quantized]" in caught.value.hint


def test_two_families_of_states() -> None:
    families = [[kind for kind in KINDS if same_states(kind, own)] for own in KINDS]
    assert families == [list(KINDS[:3])] * 3 + [list(KINDS[3:])] * 2


KINDS: tuple[Optimizer, ...] = ("adamw-fused", "adamw-foreach", "adamw-loop", *EIGHT_BIT)
