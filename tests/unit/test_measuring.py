"""The climb: which micro-batches run, where it ends, what stands beside each; with a form by hand and rungs that never ran."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomph.core.allocator import Allocator, replay
from oomph.core.closed_form import ClosedForm
from oomph.core.devices import find_gpu, outside
from oomph.core.footprint import live_footprint
from oomph.core.forms import FormKey, Traced
from oomph.core.layout import lay_out
from oomph.core.machine import constant, machine_file
from oomph.core.measuring import CPU_LARGEST, Job, Machine, Reading, measure
from oomph.errors import UserError
from oomph.recipe import Recipe
from oomph.records import Choice, Footprint, Measurement, PhasePeak
from oomph.units import GIB, MIB

TOKENS = 1024
NAME = "NVIDIA A100-SXM4-40GB"
DATE = "2026-01-02T03:04:05"


class Source:
    """Serves one form for every key."""

    def __init__(self, form: ClosedForm) -> None:
        self.form, self.keys = form, list[FormKey]()

    def prepare(self, keys: Sequence[FormKey]) -> None:
        self.keys += keys

    def traced(self, key: FormKey) -> Traced:
        self.keys.append(key)
        return Traced(self.form, 0, "by hand")


@pytest.fixture
def source(toy: ClosedForm) -> Source:
    return Source(toy)


@pytest.fixture(autouse=True)
def _config_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def card(usable: int = 30 * GIB, name: str = NAME, others: int = 0) -> Machine:
    """A card of which the allocator can have so many bytes."""
    total = usable + outside(find_gpu("A100-SXM4-40GB"), 1).bytes + others
    return Machine("cuda", name, "580.1", "13.0", total, total - others, (8, 0), 108, {"torch": "2.13.0"}, DATE)


def cpu(free: int = 16 * GIB) -> Machine:
    return Machine("cpu", "EPYC", "", "", 32 * GIB, free, (), 2, {"torch": "2.13.0"}, DATE)


def recipe(batch: int = 8, stages: Sequence[str] = ("tune",), hardware: Any = None, stage: Any = None, **memory: Any) -> Recipe:
    trained = {"language": 1e-4, "vision": "frozen", "head": "frozen"}
    named = [{"name": name, "train": trained, "effective_batch": batch, **(stage or {})} for name in stages]
    return Recipe.model_validate(
        {
            "name": "small",
            "model": "llama-3.1-8b",
            "data": {"max_tokens": TOKENS},
            "hardware": {"gpu": "A100-SXM4-40GB", **(hardware or {})},
            "memory": {"checkpointing": "none", **memory},
            "stages": named,
        }
    )


class Runner:
    """Gives what is predicted, changed by a function, in place of a run."""

    def __init__(self, source: Source, change: Callable[[Footprint], Footprint] = lambda footprint: footprint) -> None:
        self.jobs: list[Job] = []
        self._source, self._change = source, change

    def __call__(self, job: Job) -> Reading:
        self.jobs.append(job)
        events = lay_out(self._source.form, job.choice, job.shape.tokens, 0)
        if job.device == "cpu":
            footprint = live_footprint(events)
        else:
            result = replay(events.sizes, events.segments, Allocator())
            footprint = Footprint(result.peak_allocated, result.peak_reserved, result.phases)
        return Reading(self._change(footprint), 2 * GIB, 500 * MIB, 0.5, 0.9, 0.4)

    def sizes(self) -> list[int]:
        return [job.choice.micro_batch for job in self.jobs]


def needs(source: Source, micro_batch: int, batch: int = 8) -> int:
    """What a card must have at the least for a rung to be run: what is reserved, and the error bound."""
    runner = Runner(source)
    measured = measure(recipe(batch, micro_batch=micro_batch), source, card(), runner)
    rung = measured.stages[0].rungs[-1]
    return rung.predicted.reserved_peak_bytes + rung.bound_bytes


def test_the_climb_doubles_to_the_share_of_the_gpu(source: Source) -> None:
    runner = Runner(source)
    measured = measure(recipe(batch=12), source, card(), runner)
    assert runner.sizes() == [1, 2, 4, 8, 12]
    assert measured.within
    (stage,) = measured.stages
    assert stage.samples_tokens == TOKENS
    assert stage.stopped == "micro-batch 12: all samples of the effective batch"
    assert [rung.choice.accumulation for rung in stage.rungs] == [2, 2, 2, 2, 1]
    assert all(rung.predicted.allocated_peak_bytes == rung.measured.allocated_peak_bytes for rung in stage.rungs)  # type: ignore[union-attr]
    assert stage.rungs[1].samples_per_second == 4 / 0.5
    assert stage.rungs[1].tokens_per_second == 4 / 0.5 * TOKENS


def test_a_pinned_micro_batch_is_the_last_rung(source: Source) -> None:
    runner = Runner(source)
    measured = measure(recipe(micro_batch=6), source, card(), runner)
    assert runner.sizes() == [1, 2, 4, 6]
    assert measured.stages[0].stopped == "micro-batch 6: the recipe's micro-batch"


@pytest.mark.parametrize("largest", range(1, 12))
def test_the_climb_ends_at_the_largest_that_is_predicted_to_fit(source: Source, largest: int) -> None:
    room = needs(source, largest, 24)
    runner = Runner(source)
    measured = measure(recipe(batch=24, micro_batch="auto"), source, card(room), runner)
    possible = [cut for cut in (1, 2, 3, 4, 5, 6, 8, 12) if cut <= largest]
    assert max(runner.sizes()) == max(possible)
    assert runner.sizes() == sorted(set(runner.sizes()))
    assert measured.stages[0].stopped.startswith("micro-batch ")
    assert "is predicted to need" in measured.stages[0].stopped


def test_nothing_runs_where_not_even_one_sample_fits(source: Source) -> None:
    runner = Runner(source)
    measured = measure(recipe(), source, card(needs(source, 1) - 1), runner)
    assert runner.jobs == []
    assert not measured.within
    assert measured.stages[0].rungs == ()
    assert measured.stages[0].stopped.startswith("micro-batch 1 is predicted to need")


def test_an_absurd_batch_is_climbed_as_far_as_it_goes(source: Source) -> None:
    runner = Runner(source)
    measured = measure(recipe(batch=10**9, micro_batch=10**9), source, card(GIB), runner)
    assert max(runner.sizes()) < 1000
    assert measured.within


def test_a_failure_ends_the_climb_and_is_no_success(source: Source) -> None:
    runner = Runner(source)

    def run(job: Job) -> Reading:
        return runner(job) if job.choice.micro_batch < 4 else Reading(None, failure="out of memory in phase backward")

    measured = measure(recipe(), source, card(), run)
    rungs = measured.stages[0].rungs
    assert [rung.choice.micro_batch for rung in rungs] == [1, 2, 4]
    assert [rung.within for rung in rungs] == [True, True, False]
    assert rungs[-1].failure == "out of memory in phase backward"
    assert measured.stages[0].stopped == "micro-batch 4 failed"
    assert not measured.within


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("field", ["allocated_peak_bytes", "reserved_peak_bytes"])
def test_within_means_no_further_than_the_bound_on_either_side(source: Source, field: str, sign: int) -> None:
    def measured_with(change: int) -> bool:
        runner = Runner(source, lambda footprint: replace(footprint, **{field: getattr(footprint, field) + change}))
        return measure(recipe(micro_batch=1), source, card(), runner).within

    bound = measure(recipe(micro_batch=1), source, card(), Runner(source)).stages[0].rungs[0].bound_bytes
    assert measured_with(sign * bound)
    assert not measured_with(sign * (bound + 1))


def test_every_rung_is_told_as_soon_as_it_has_run(source: Source) -> None:
    told: list[Measurement] = []

    def run(job: Job) -> Reading:
        if job.choice.micro_batch == 4:
            raise KeyboardInterrupt
        return Runner(source)(job)

    with pytest.raises(KeyboardInterrupt):
        measure(recipe(), source, card(), run, done=told.append)
    assert [[rung.choice.micro_batch for rung in m.stages[0].rungs] for m in told] == [[1], [2]]
    assert all(len(m.stages) == 1 for m in told)


def test_the_first_stage_is_measured_unless_others_are_named(source: Source) -> None:
    two = recipe(stages=("align", "tune"), micro_batch=1)
    assert [stage.name for stage in measure(two, source, card(), Runner(source)).stages] == ["align"]
    both = measure(two, source, card(), Runner(source), ["tune", "align"])
    assert [stage.name for stage in both.stages] == ["tune", "align"]


def test_a_measurement_survives_json(source: Source) -> None:
    measured = measure(recipe(), source, card(), Runner(source))
    assert Measurement.from_json(json.loads(json.dumps(measured.to_json()))) == measured
    with pytest.raises(ValueError, match="another version"):
        Measurement.from_json({**measured.to_json(), "schema": 7})


# The card at hand.


def test_the_card_at_hand_is_planned_for(source: Source) -> None:
    runner = Runner(source)
    measured = measure(recipe(micro_batch=1), source, card(name="NVIDIA H200"), runner)
    assert measured.gpu == "H200-SXM-141GB"
    assert any("the card at hand is H200-SXM-141GB" in note for note in measured.notes)
    assert not measure(recipe(micro_batch=1), source, card(), runner).notes


def test_a_card_that_is_not_catalogued_is_measured_too(source: Source) -> None:
    strange = replace(card(name="NVIDIA X9000"), capability=(9, 0))
    runner = Runner(source)
    measured = measure(recipe(micro_batch=1), source, strange, runner)
    assert measured.gpu == "NVIDIA X9000"
    assert {job.key.capability for job in runner.jobs} == {(9, 0)}
    assert measured.within


def test_what_other_processes_hold_is_not_usable(source: Source) -> None:
    room = needs(source, 2)
    runner = Runner(source)
    measured = measure(recipe(), source, card(room, others=3 * GIB), runner)
    assert runner.sizes() == [1, 2]
    assert measured.notes == ("other processes hold 3.00 GiB of the card",)


def test_several_gpus_become_the_share_of_one(source: Source) -> None:
    runner = Runner(source)
    many = recipe(batch=32, hardware={"gpus": 8, "nodes": 2}, stage={"memory": {"sharding": "zero2"}}, sharding="fsdp2")
    measured = measure(many, source, card(), runner)
    assert runner.sizes() == [1, 2, 4]
    assert {job.choice.sharding for job in runner.jobs} == {"none"}
    assert {job.choice.gpus for job in runner.jobs} == {1}
    assert any("8 GPUs" in note for note in measured.notes)


def test_the_context_that_was_seen_is_kept_for_later_plans(source: Source) -> None:
    measure(recipe(micro_batch=1), source, card(), Runner(source))
    seen = constant("A100-SXM4-40GB", "2.13.0", "context")
    assert seen is not None
    assert (seen.bytes, seen.driver, seen.date) == (500 * MIB, "580.1", DATE)


def test_a_context_that_cannot_be_kept_is_said_and_no_error(source: Source) -> None:
    machine_file().parent.parent.mkdir()
    machine_file().parent.write_text("in the way")
    told: list[str] = []
    assert measure(recipe(micro_batch=1), source, card(), Runner(source), notify=told.append).within
    assert any("CUDA context is not kept" in sentence for sentence in told)


# The CPU.


def test_on_the_cpu_the_rules_are_off_and_the_climb_is_short(source: Source) -> None:
    runner = Runner(source)
    measured = measure(recipe(batch=64), source, cpu(), runner)
    assert runner.sizes() == [1, 2, CPU_LARGEST]
    assert {key.capability for key in source.keys} == {()}
    assert {job.key.capability for job in runner.jobs} == {()}
    assert measured.within
    assert "CPU: checks the step, not CUDA's kernels" in measured.notes[0]
    assert not machine_file().exists() or constant("EPYC", "2.13.0", "context") is None


def test_on_the_cpu_more_is_run_if_it_is_asked_for(source: Source) -> None:
    runner = Runner(source)
    measure(recipe(batch=64, micro_batch=16), source, cpu(), runner)
    assert runner.sizes() == [1, 2, 4, 8, 16]


def test_the_machine_is_not_filled(source: Source) -> None:
    with pytest.raises(UserError, match="tune does not fit into this machine's memory: micro-batch 1 is predicted") as error:
        measure(recipe(), source, cpu(GIB + MIB), Runner(source))
    assert "smaller model" in error.value.hint


def test_the_cpu_refuses_what_runs_on_cuda_alone(source: Source) -> None:
    adapters = {"train": {"language": "frozen", "head": "frozen", "lora": 1e-4}, "lora": {"rank": 4}}
    quantized = recipe(stage={**adapters, "quantization": {"kind": "nf4"}}, optimizer="adamw-8bit")
    with pytest.raises(UserError) as error:
        measure(quantized, source, cpu(), Runner(source))
    assert [problem.split(":")[1].split()[0] for problem in error.value.problems] == ["quantized", "optimizer"]
    with pytest.raises(UserError, match="optimizer_offload has no meaning on the CPU"):
        measure(recipe(optimizer_offload=True), source, cpu(), Runner(source))
    assert not source.keys


# Footprints of live storages.


@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_a_live_footprint_is_a_replay_without_rounding(toy: ClosedForm, accumulation: int) -> None:
    events = lay_out(toy, Choice(2, accumulation, 2 * accumulation, eval_batch=2), TOKENS, 0)
    footprint = live_footprint(events)
    alive, peak = 0, 0
    for segment in events.segments:
        for entry in [*segment.timeline] * segment.repeat:
            alive += events.sizes[entry] if entry >= 0 else -events.sizes[~entry]
            peak = max(peak, alive)
    assert footprint.allocated_peak_bytes == footprint.reserved_peak_bytes == peak
    replayed = replay(events.sizes, events.segments, Allocator())
    assert [phase.phase for phase in footprint.phases] == [phase.phase for phase in replayed.phases]
    for live, rounded in zip(footprint.phases, replayed.phases, strict=True):
        assert live.allocated_peak_bytes <= rounded.allocated_peak_bytes <= live.allocated_peak_bytes + 4 * MIB


def test_phases_begin_with_what_the_ones_before_left() -> None:
    from oomph.core.events import Events, Kind, Segment

    events = Events()
    for nbytes in (100, 30, 5):
        events.add(nbytes, (nbytes,), Kind("", "", "", "", "uint8"))
    events.segments = [Segment("load", [0]), Segment("step", [1, ~1, 2, ~0], ((0, "forward"), (2, "backward")), 1)]
    peaks = live_footprint(events).phases
    assert peaks == (PhasePeak("load", 100, 100), PhasePeak("forward", 130, 130), PhasePeak("backward", 105, 105))
