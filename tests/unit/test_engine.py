"""The engine of a step: what it does with samples that do not fit, what it leaves alone, what it lets others know."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from oomph.core.admission import Cost, Split, TooLargeError
from oomph.core.layout import Shape
from oomph.errors import RunError
from oomph.live import recover
from oomph.live.budget import memory_limit, resident
from oomph.live.engine import Engine, StepResult
from oomph.live.optimizers import optimizer_over
from oomph.live.step import LOSSES, train_step
from oomph.records import Choice, Recovery

ASKED = Choice(4, 1, 4, precision="float32")
RUNGS = [replace(ASKED, loss="chunked"), replace(ASKED, loss="chunked", checkpointing="blocks")]
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """Small products are faster on one thread, and a collection of garbage need not look at libraries."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


class Known(NamedTuple):
    tokens: int
    images: int
    label_tokens: int


@dataclass(frozen=True)
class Text:
    """A sample whose tokens are all learned from, or none of them."""

    name: str
    ids: Tensor
    learned: bool = True

    @property
    def cost(self) -> Known:
        return Known(len(self.ids), 0, (len(self.ids) - 1) * self.learned)


def texts(*lengths: int) -> list[Text]:
    generator = torch.Generator().manual_seed(5)
    made = [torch.randint(1, 60, (length,), generator=generator) for length in lengths]
    return [Text(f"data.json, line {at + 1}", ids) for at, ids in enumerate(made)]


SAMPLES = texts(5, 9, 7, 6)


def collate(samples: Sequence[Text], tokens: int = 0) -> dict[str, Tensor]:
    assert tokens in (0, 10 * len(samples))
    pad = torch.nn.utils.rnn.pad_sequence
    labels = [sample.ids if sample.learned else torch.full_like(sample.ids, -100) for sample in samples]
    return {
        "input_ids": pad([sample.ids for sample in samples], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


@dataclass
class Room:
    """Admits micro-batches of up to so many tokens, one after the other, and remembers what it is told."""

    limit_bytes: int = 1000
    told: list[str] = field(default_factory=list)

    def split(self, costs: Sequence[Cost]) -> Split:
        pieces: list[list[int]] = []
        for at, cost in enumerate(costs):
            if cost.tokens > self.limit_bytes:
                raise TooLargeError(at, cost.tokens, self.limit_bytes)
            if not pieces or sum(costs[p].tokens for p in pieces[-1]) + cost.tokens > self.limit_bytes:
                pieces.append([])
            pieces[-1].append(at)
        peaks = tuple(sum(costs[p].tokens for p in piece) for piece in pieces)
        return Split(tuple(map(tuple, pieces)), tuple(Shape(len(piece), 10 * len(piece), 0) for piece in pieces), peaks, 1.0)

    def failed(self, split: Split, micro_batch: int) -> None:
        self.limit_bytes = split.peak_bytes[micro_batch] - 1
        self.told.append(f"failed {split.peak_bytes[micro_batch]}")

    def committed(self) -> None:
        self.told.append("committed")

    def shrink(self) -> None:
        self.limit_bytes //= 2
        self.told.append("shrink")

    def state(self) -> dict[str, int]:
        return {"limit": self.limit_bytes}

    def restore(self, state: dict[str, int]) -> None:
        self.limit_bytes = state["limit"]


class Refusing(nn.Module):
    """Passes tensors on; refuses those with more tokens than it may."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.most, self.seen = 1000, 0
        self.error: Callable[[], BaseException] = lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 B.")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        if x.shape[0] * x.shape[1] > self.most:
            raise self.error()
        return x


class Bench:
    """An engine with all that it works on."""

    def __init__(self, limit: int = 1000, choice: Choice = ASKED, **settings: Any) -> None:
        torch.manual_seed(1)
        config = LlamaConfig(num_key_value_heads=1, vocab_size=64, max_position_embeddings=32, **SIZES)
        config.attention_dropout = 0.1
        self.model = LlamaForCausalLM(config).train()
        self.inner: Any = Refusing()
        self.model.model.layers[0].mlp = nn.Sequential(self.model.model.layers[0].mlp, self.inner)
        self.optimizer = optimizer_over(self.model.parameters(), "adamw-foreach", lr=1e-2)
        self.rooms: dict[Choice, Room] = {}
        self.limit = limit

        def admit(choice: Choice) -> Room:
            self.rooms[choice] = Room(limit)
            return self.rooms[choice]

        self.engine: Engine[Text] = Engine(self.model, self.optimizer, choice, admit, collate, **settings)
        self.random = torch.manual_seed(2).get_state()

    def step(self, number: int, samples: Sequence[Text] = SAMPLES, rehearse: bool = False) -> StepResult:
        """A step that draws its own random numbers, whatever other engines do."""
        with self.drawing():
            return (self.engine.rehearse if rehearse else self.engine.step)(number, samples)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        torch.set_rng_state(self.random)
        yield
        self.random = torch.get_rng_state()

    def everything(self) -> list[Tensor]:
        """All that a step may change, but for what was learnt of memory."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *states, self.random]
        return [tensor.detach().clone() for tensor in (*tensors, torch.tensor(self.inner.seen))]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def room_of(bench: Bench, choice: Choice = ASKED) -> Room:
    return bench.rooms[choice]


# A step.


def test_a_step_is_the_step_that_is_traced() -> None:
    bench, bare = Bench(16), Bench()
    done = bench.step(0)
    batches = [lambda piece=piece: collate([SAMPLES[p] for p in piece]) for piece in ((0, 1), (2, 3))]
    with bare.drawing():
        loss = train_step(bare.model, bare.optimizer, batches, LOSSES["full"], 23)
    assert done.split is not None
    assert done.split.micro_batches == ((0, 1), (2, 3))
    assert (done.loss, done.num_tokens, done.choice) == (float(loss), 23, ASKED)
    assert (done.predicted_peak_bytes, done.measured_peak_bytes, done.recoveries) == (14, None, ())
    assert done.grad_norm is not None
    assert done.grad_norm > 0
    assert done.seconds > 0
    assert same(bench.everything(), bare.everything())
    assert room_of(bench).told == ["committed"]


def test_gradients_may_stay_unclipped() -> None:
    bench, bare = Bench(max_grad_norm=None), Bench()
    assert bench.step(0).grad_norm is None
    with bare.drawing():
        train_step(bare.model, bare.optimizer, [lambda: collate(SAMPLES)], LOSSES["full"], 23, max_grad_norm=None)
    assert same(bench.everything(), bare.everything())


def test_without_label_tokens_nothing_happens() -> None:
    bench = Bench()
    bench.step(0)
    before = bench.everything()
    done = bench.step(1, [replace(sample, learned=False) for sample in SAMPLES])
    assert (done.loss, done.grad_norm, done.num_tokens, done.split, done.predicted_peak_bytes) == (None, None, 0, None, None)
    assert same(bench.everything(), before)
    assert bench.step(2, []).loss is None
    assert same(bench.everything(), before)


def test_a_sample_without_label_tokens_trains_nothing() -> None:
    bench, without = Bench(9), Bench(9)
    mute = [SAMPLES[1], replace(SAMPLES[0], learned=False)]
    done, plain = bench.step(0, mute), without.step(0, mute[:1])
    assert done.loss == plain.loss
    for ours, theirs in zip(bench.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_mixed_precision_redoes_a_step_with_its_scaler() -> None:
    choice = replace(ASKED, precision="float16-mixed")
    redone, planned = Bench(choice=choice), Bench(26, choice=choice)
    redone.inner.most = 27
    for step in range(2):
        one, other = redone.step(step), planned.step(step)
        assert one.loss == other.loss
        assert len(one.recoveries) == (step == 0)
    assert redone.engine.scaler is not None
    assert same(redone.everything(), planned.everything())
    assert redone.engine.state()["scaler"] == planned.engine.state()["scaler"]


# Redone.


def test_a_redone_step_is_one_that_was_planned_smaller() -> None:
    """Buffers that count, numbers beside them and dropout's masks included."""
    redone, planned = Bench(), Bench(26)
    redone.inner.most = 27
    done = redone.step(7)
    planned.step(7)
    (recovery,) = done.recoveries
    assert recovery == Recovery(
        step=7,
        micro_batch=0,
        kind="allocator",
        phase="forward",
        module="model.layers.0.mlp.1",
        message="CUDA out of memory. Tried to allocate 1 B.",
        predicted_bytes=27,
        limit_bytes=1000,
        measured_bytes=None,
        from_choice=ASKED,
        to_choice=ASKED,
        from_split=((0, 1, 2, 3),),
        to_split=((0, 1, 2), (3,)),
    )
    assert Recovery.from_json(json.loads(json.dumps(recovery.to_json()))) == recovery
    assert same(redone.everything(), planned.everything())
    assert room_of(redone).told == ["failed 27"], "a step that was redone was not clean"


@pytest.mark.parametrize(
    "error", [ValueError("ours"), KeyboardInterrupt(), RuntimeError("CUDA error: out of luck")], ids=lambda e: type(e).__name__
)
def test_another_error_leaves_things_as_they_were(error: BaseException) -> None:
    bench = Bench(16)
    bench.step(0)
    before = bench.everything()

    def fail(samples: Sequence[Text], tokens: int) -> dict[str, Tensor]:
        if samples[0] is SAMPLES[2]:
            raise error
        return collate(samples)

    bench.engine._collate = fail
    with pytest.raises(type(error)):
        bench.step(1)
    assert same(bench.everything(), before)
    assert all(parameter.grad is None for parameter in bench.model.parameters())
    bench.engine._collate = collate
    assert bench.step(1).loss is not None


def test_memory_that_runs_out_in_the_update_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, calls = Bench(), []

    def step() -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 B.")

    monkeypatch.setattr(bench.optimizer, "step", step)
    with pytest.raises(RunError, match=r"in the update of step 3, of which a part may be done: CUDA out of memory") as error:
        bench.step(3)
    assert "last checkpoint is good" in error.value.hint
    assert calls == [1], "it is never run again"
    monkeypatch.setattr(bench.optimizer, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.step(4)


def test_clipping_may_fail_and_be_redone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, planned = Bench(), Bench(26)
    clip, calls = nn.utils.clip_grad_norm_, []

    def once(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return clip(*args, **kwargs)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", once)
    (recovery,) = bench.step(0).recoveries
    planned.step(0)
    assert (recovery.phase, recovery.predicted_bytes) == ("clip", 27)
    assert same(bench.everything(), planned.everything())


def test_no_memory_for_the_optimizer_s_states(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 B.\nmore")

    monkeypatch.setattr("oomph.live.engine.materialise", fail)
    with pytest.raises(RunError, match="there is no memory for the optimizer's states: CUDA out of memory"):
        Bench()


def test_a_device_that_is_gone_is_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.inner.most, bench.inner.error = 0, lambda: torch.AcceleratorError("CUDA error: out of memory")
    monkeypatch.setattr(recover, "healthy", lambda device: False)
    monkeypatch.setattr(bench.engine._snapshot, "restore", lambda: 1 / 0)
    with pytest.raises(recover.DeviceLostError):
        bench.step(0)


def test_nothing_leaks() -> None:
    """Fifty steps, each redone: the same storages afterwards as before, by the counter and by Python's own list of objects."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(item), Tensor) for item in gc.get_objects())

    bench = Bench()
    bench.inner.most = 27
    with memory_limit(None, torch.device("cpu"), resident(bench.model, bench.optimizer)) as memory:
        held, objects = [], []
        for step in range(51):
            if step:
                room_of(bench).limit_bytes = 1000
            assert len(bench.step(step).recoveries) == 1
            if step in (0, 50):
                held.append(memory.allocated_bytes)
                objects.append(tensors())
    assert held[0] == held[1]
    assert objects[0] == objects[1]


# Samples that do not fit.


def test_the_next_rung_takes_a_sample_that_does_not_fit() -> None:
    bench, planned = Bench(rungs=RUNGS), Bench(choice=RUNGS[1])
    bench.step(0)
    planned.step(0)
    room_of(bench).limit_bytes = 8
    bench.engine._admission(1).restore({"limit": 8})
    done = bench.step(1)
    assert (done.choice, done.recoveries) == (RUNGS[1], ())
    assert bench.model.is_activation_checkpointing
    assert [room_of(bench, choice).told for choice in (ASKED, *RUNGS)] == [["committed"] * 2, ["committed"], ["committed"]]
    room_of(bench).limit_bytes = 9
    assert bench.step(2).choice == ASKED
    assert not bench.model.is_activation_checkpointing


def test_a_sample_that_runs_out_alone_goes_on_to_the_next_rung() -> None:
    bench = Bench(9, rungs=RUNGS[:1])
    failing = iter([True, False])

    def once(samples: Sequence[Text], tokens: int) -> dict[str, Tensor]:
        if samples == SAMPLES[1:2] and next(failing):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return collate(samples)

    bench.engine._collate = once
    done = bench.step(0)
    (recovery,) = done.recoveries
    assert (recovery.micro_batch, recovery.from_choice, recovery.to_choice) == (1, ASKED, RUNGS[0])
    assert done.choice == RUNGS[0]
    assert bench.step(1, SAMPLES[2:]).choice == ASKED, "other samples stay on the first"


def test_a_sample_that_never_fits_is_named() -> None:
    bench = Bench(8, rungs=RUNGS)
    before = bench.everything()
    with pytest.raises(RunError) as error:
        bench.step(0)
    assert str(error.value) == "data.json, line 2 does not fit by itself: its 9 tokens and 0 images take 9 B, and there are 8 B"
    assert "data.max_tokens" in error.value.hint
    assert same(bench.everything(), before)


def test_a_sample_that_never_fits_may_be_skipped() -> None:
    bench, without = Bench(8, too_large="skip"), Bench(8)
    done = bench.step(0)
    plain = without.step(0, [SAMPLES[0], *SAMPLES[2:]])
    assert (done.loss, done.num_tokens, done.skipped) == (plain.loss, plain.num_tokens, ("data.json, line 2",))
    assert done.split is not None
    assert done.split.micro_batches == ((0,), (2,), (3,)), "positions are those of the step's samples"
    assert same(bench.everything(), without.everything())
    room_of(bench).limit_bytes = 4
    before = bench.everything()
    nothing = bench.step(1)
    assert (nothing.loss, len(nothing.skipped)) == (None, 4)
    assert same(bench.everything(), before)


def test_a_sample_that_runs_out_alone_may_be_skipped_too() -> None:
    bench, without = Bench(too_large="skip"), Bench(8)
    bench.inner.most = 8
    done = bench.step(0)
    without.step(0, [SAMPLES[0], *SAMPLES[2:]])
    assert done.skipped == ("data.json, line 2",)
    assert [recovery.predicted_bytes for recovery in done.recoveries] == [27, 21, 14, 9]
    assert done.recoveries[-1].to_split == ((0,), (2,), (3,))
    room_of(bench).limit_bytes = 8
    assert same(bench.everything(), without.everything())


def test_a_sample_that_never_fits_may_be_made_smaller() -> None:
    def smaller(sample: Text) -> Text | None:
        return replace(sample, ids=sample.ids[:-1]) if len(sample.ids) > 6 else None

    bench, without = Bench(7, too_large="shrink", smaller=smaller), Bench(7)
    done = bench.step(0)
    without.step(0, [SAMPLES[0], replace(SAMPLES[1], ids=SAMPLES[1].ids[:7]), *SAMPLES[2:]])
    assert (done.shrunk, done.skipped, done.num_tokens) == (("data.json, line 2",), (), 21)
    assert same(bench.everything(), without.everything())
    room_of(bench).limit_bytes = 5
    with pytest.raises(RunError, match=r"data\.json, line 2 does not fit by itself: its 6 tokens"):
        bench.step(1)


# Learning.


@dataclass
class Card:
    """A card's memory."""

    retries: int = 0
    allocated_bytes: int = 0
    peak_bytes: int = 55

    def reset_peak(self) -> None: ...


def test_retries_shrink_the_next_step_and_redo_nothing() -> None:
    card = Card()
    bench, plain = Bench(memory=card), Bench()
    first = bench.step(0)
    assert (first.recoveries, first.measured_peak_bytes) == ((), 55)

    def collate_and_retry(samples: Sequence[Text], tokens: int) -> dict[str, Tensor]:
        card.retries += 2
        return collate(samples)

    bench.engine._collate = collate_and_retry
    second = bench.step(1)
    for step in range(2):
        plain.step(step)
    assert same(bench.everything(), plain.everything())
    (recovery,) = second.recoveries
    assert (recovery.kind, recovery.phase, recovery.measured_bytes) == ("retries", "step", 55)
    assert recovery.message == "the allocator gave back what it kept for later 2 times"
    assert recovery.from_split == recovery.to_split == ((0, 1, 2, 3),)
    assert room_of(bench).told == ["committed", "shrink"]


def test_a_rehearsal_changes_nothing_but_what_is_known_of_memory() -> None:
    bench = Bench()
    bench.step(0)
    bench.inner.most = 27
    before = bench.everything()
    rehearsed: StepResult = bench.step(1, rehearse=True)
    assert len(rehearsed.recoveries) == 1
    assert same(bench.everything(), before)
    assert all(parameter.grad is None for parameter in bench.model.parameters())
    done = bench.step(1)
    assert (done.loss, done.recoveries) == (rehearsed.loss, ())


def test_what_was_learnt_goes_on_in_another_engine() -> None:
    bench = Bench(rungs=RUNGS, choice=ASKED)
    room_of_first = bench.engine._admission(0)
    room_of_first.restore({"limit": 8})
    bench.engine._admission(2).restore({"limit": 12})
    state = json.loads(json.dumps(bench.engine.state()))
    other = Bench(rungs=[RUNGS[1]])
    other.engine.restore(state)
    assert other.engine._admission(0).limit_bytes == 8
    assert other.engine._admission(1).limit_bytes == 12
    assert state["scaler"] is None
