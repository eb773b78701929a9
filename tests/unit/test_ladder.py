"""The ladder against brute force, and the promises of its words, on forms written by hand whose knobs do what they say."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from oomph.core.choices import clashes, cuts, micro_batch_sizes, resolve, with_micro_batch
from oomph.core.devices import Gpu, find_gpu, outside
from oomph.core.eight_bit import EIGHT_BIT
from oomph.core.ladder import Climbed, climb
from oomph.core.predict import surely
from oomph.core.search import ALIKE, APART, STEP
from oomph.core.space import KNOBS
from oomph.core.stage import StageModel
from oomph.errors import UserError
from oomph.recipe import Recipe, memory_of
from oomph.records import Choice, Rung

A100 = find_gpu("A100-SXM4-40GB")
PARTS = {"vision": "clip-vit-large-patch14-336-vision", "projector": "mlp2x_gelu", "language": "phi-2"}
CLOSE = (1 + ALIKE) / (1 - APART)
"""By what factor a time may be above another that a search takes for no better."""
COUNTERS = 20 * 512
"""What the step counters of the fused AdamW take at the most, which the search does not count."""
MOST = 250
"""Configurations of a search space that brute force goes through."""


def recipe(
    gpus: int = 1, nodes: int = 1, batch: int = 8, images: int = 1, train: Any = None, model: Any = PARTS, **memory: Any
) -> Recipe:
    trains = {"language": 1e-4, "vision": "frozen", "projector": "frozen", "head": 1e-4} | (train or {})
    return Recipe.model_validate(
        {
            "name": "small",
            "model": model,
            "data": {"max_tokens": 512, "images_per_sample": images},
            "hardware": {"gpu": A100.name, "gpus": gpus, "nodes": nodes},
            "memory": memory,
            "stages": [{"name": "tune", "train": trains, "effective_batch": batch}],
        }
    )


def card(usable: int, gpus: int) -> Gpu:
    """A card of which the allocator can have so many bytes."""
    return replace(A100, name="small", memory_bytes=usable + outside(A100, gpus).bytes)


@dataclass(frozen=True)
class Case:
    """A stage to search: what is asked for, which knobs are held."""

    recipe: Recipe
    keep: frozenset[str]

    @property
    def asked(self) -> Choice:
        return resolve(self.recipe.stages[0], self.recipe, A100)[0]

    @property
    def pins(self) -> dict[str, Any]:
        memory = memory_of(self.recipe, self.recipe.stages[0])
        return {knob: getattr(self.asked, knob) for knob in (*KNOBS, "micro_batch") if getattr(memory, knob) != "auto"}

    def model(self, source: Any, gpu: Gpu = A100) -> StageModel:
        return StageModel(self.recipe, self.recipe.stages[0], gpu, source)

    def everything(self) -> list[Choice]:
        """Every configuration with the effective batch and the mathematics asked for, that keeps what has to be kept."""
        asked, memory = self.asked, memory_of(self.recipe, self.recipe.stages[0])
        own = [knob for knob in KNOBS if knob not in self.keep]
        domains = [dict.fromkeys([getattr(asked, knob), *KNOBS[knob]]) for knob in own]
        found = []
        for values in itertools.product(*domains):
            choice = replace(asked, **dict(zip(own, values, strict=True)))
            if clashes(vars(choice), A100, self.recipe.hardware):
                continue
            every = cuts(choice, choice.sharding, every=True)
            kept = [cut for cut in every if "micro_batch" not in self.keep or cut == asked.micro_batch]
            found += [with_micro_batch(choice, cut, memory.eval_batch) for cut in kept]
        return found

    def keeps_pins(self, choice: Choice) -> bool:
        return all(getattr(choice, knob) == value for knob, value in self.pins.items())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A random recipe, of which a few knobs are searched."""
    gpus, nodes = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (4, 1), (4, 2)]))
    free = draw(st.sets(st.sampled_from(sorted(KNOBS)), min_size=2, max_size=4))
    names = draw(st.sets(st.sampled_from(sorted(KNOBS)), max_size=4))
    pinned = {name: draw(st.sampled_from([value for value in KNOBS[name]])) for name in sorted(names)}
    batch = draw(st.integers(gpus, 2 * gpus + 6))
    if draw(st.booleans()):
        pinned["micro_batch"] = draw(st.integers(1, -(-batch // gpus)))
    if draw(st.booleans()):
        pinned["eval_batch"] = draw(st.sampled_from([1, 3, "none"]))
    wanted = recipe(
        gpus,
        nodes,
        batch,
        draw(st.integers(0, 1)),
        {"vision": draw(st.sampled_from(["frozen", 1e-4]))},
        master_weights=draw(st.booleans()),
        **pinned,
    )
    keep = set(KNOBS) - free | draw(st.sets(st.just("micro_batch"))) if pinned.get("micro_batch") else set(KNOBS) - free
    case = Case(wanted, frozenset(keep))
    try:
        assume(len(case.everything()) <= MOST)
    except UserError:
        assume(False)
    return case


sizes = st.fixed_dictionaries(
    {
        "blocks": st.integers(1, 3),
        "towers": st.integers(1, 2),
        "width": st.sampled_from([64, 256]),
        "heads": st.sampled_from([1, 8]),
        "vocabulary": st.sampled_from([512, 8192]),
        "inner": st.sampled_from([1, 8]),
        "work": st.sampled_from([1, 100]),
    }
)


class Brute:
    """All configurations of a case, each with what a trace at its very shape predicts."""

    def __init__(self, case: Case, model: StageModel) -> None:
        self.model = model
        self.choices = case.everything()
        self.predictions = {choice: model.predict(choice) for choice in self.choices}
        self.fitting = [choice for choice in self.choices if self.fits(choice)]

    def seconds(self, choice: Choice) -> float:
        return self.model.speed(choice).step_seconds

    def fits(self, choice: Choice) -> bool:
        return self.predictions[choice].fits

    def surely(self, choice: Choice) -> bool:
        return surely(self.predictions[choice])

    def fastest(self, choices: Iterable[Choice]) -> float:
        return min(map(self.seconds, choices))

    def expected_at_most(self, choice: Choice) -> int:
        """The most that a search expects of a choice: its bound, and what one of its kind has above that."""
        kind = (choice.sharding, choice.checkpointing, choice.optimizer_offload)
        alike = [c for c in self.choices if (c.sharding, c.checkpointing, c.optimizer_offload) == kind]
        above = max(self.predictions[c].allocated_peak_bytes - self.model.bound(c) for c in alike)
        return self.model.bound(choice) + above


def room(case: Case, source: Any, share: float) -> int:
    """Bytes between what a lean configuration reserves and what a fat one does."""
    model = case.model(source)
    everything = sorted(case.everything(), key=model.bound)
    least, most = (model.predict(choice).reserved_peak_bytes for choice in (everything[0], everything[-1]))
    return int(least + share * (most - least))


@settings(max_examples=20, phases=[Phase.explicit, Phase.generate])  # to shrink an example would take minutes
@given(cases(), sizes, st.floats(-0.1, 1.0))
def test_the_ladder_is_what_brute_force_finds(
    by_hand: Any, better: Any, case: Case, size: dict[str, int], share: float
) -> None:
    source, traced = (by_hand(by_hand.SIZE(**size), closed) for closed in (True, False))
    gpu = card(room(case, traced, share), case.recipe.hardware.gpus)
    model = case.model(source, gpu)
    brute = Brute(case, case.model(traced, gpu))
    source.prepare(model.first_keys())
    found = climb(model, case.asked, case.keep)
    assert len(set(source.made) - set(source.prepared)) <= 1, "only the published cure may be traced by itself"
    check_rungs(case, brute, found)
    check_counts(brute, found)
    # What a search looks at instead of another may lie in more pieces, though it has no more bytes.
    eval_batch = memory_of(case.recipe, case.recipe.stages[0]).eval_batch
    held = {*case.keep, *case.pins}
    pinned = [c for c in brute.fitting if case.keeps_pins(c) and brute.fits(better(c, held, eval_batch))]
    fitting = [c for c in brute.fitting if brute.fits(better(c, case.keep, eval_batch))]
    if pinned:
        assert found.choice == found.ladder[0].choice
        assert not any(rung.changes for rung in found.ladder)
        check_ladder(brute, pinned, found.ladder)
        check_unpinned(brute, found)
    elif fitting:
        assert found.choice is None
        assert all(rung.changes for rung in found.ladder)
        check_ladder(brute, fitting, found.ladder)
    else:
        assert not found.ladder
        assert found.nearest is not None
        assert found.nearest.prediction == brute.predictions[found.nearest.choice]
        bounds = [brute.model.bound(choice) for choice in brute.choices]
        assert brute.model.bound(found.nearest.choice) <= min(bounds) + COUNTERS
    assert (found.nearest is None) == bool(found.ladder)


def check_rungs(case: Case, brute: Brute, found: Climbed) -> None:
    """What holds for every rung, whatever was found."""
    rungs = [*found.ladder, *filter(None, [found.unpinned])]
    for rung in rungs:
        choice = rung.choice
        assert rung.prediction == brute.predictions[choice]
        assert choice in brute.fitting
        assert sum(map(sum, micro_batch_sizes(choice))) == case.asked.effective_batch
        assert all(getattr(choice, knob) == getattr(case.asked, knob) for knob in case.keep)
        assert set(rung.changes) == {knob for knob, value in case.pins.items() if getattr(choice, knob) != value}
        assert rung.exact
        if choice.expandable_segments and "expandable_segments" not in {*case.keep, *case.pins}:
            assert not brute.surely(replace(choice, expandable_segments=False))
    assert [rung.step_seconds for rung in found.ladder] == sorted(rung.step_seconds for rung in found.ladder)
    assert len({rung.choice for rung in found.ladder}) == len(found.ladder)


def check_ladder(brute: Brute, fitting: Sequence[Choice], ladder: Sequence[Rung]) -> None:
    """Nothing that fits is faster than the first rung, and no rung is missing.

    Where something fits with room for the error bound, the rungs are of that. A rung is missing where a configuration is
    better than all others in time or in memory. Not looked for are those of single samples, and expandable segments where
    the configuration fits without them.
    """
    sure = [choice for choice in fitting if brute.surely(choice)]
    assert ladder[0].step_seconds <= CLOSE * brute.fastest(sure or fitting)
    assert all(brute.surely(rung.choice) for rung in ladder if sure)
    for choice in sure:
        plain = replace(choice, expandable_segments=False)
        if choice.micro_batch > 1 and (choice == plain or plain not in sure):
            seconds, most = brute.seconds(choice), brute.expected_at_most(choice)
            assert any(
                rung.step_seconds <= CLOSE * seconds and rung.prediction.allocated_peak_bytes * (1 - STEP) <= most
                for rung in ladder
            ), choice


def check_unpinned(brute: Brute, found: Climbed) -> None:
    """It is faster than all that keeps the pins, and there where anything is: of two samples or more, if there are any."""
    first = found.ladder[0].step_seconds
    if found.unpinned is not None:
        assert found.unpinned.changes
        assert found.unpinned.step_seconds < first
    largest = max(choice.micro_batch for choice in brute.choices)
    several = [choice for choice in brute.fitting if choice.micro_batch > (largest > 1) and brute.surely(choice)]
    if several and brute.fastest(several) < (1 - 4 * ALIKE) * first:
        assert found.unpinned is not None
        assert found.unpinned.step_seconds <= brute.fastest(several) * (1 + ALIKE)


def check_counts(brute: Brute, found: Climbed) -> None:
    search = found.search
    assert search.considered <= len(brute.choices)
    assert search.dominated + search.bounded + search.replayed <= search.considered


# One recipe in small: eight GPUs, scores in float32 that are most of the memory, and a card that lacks room for them.

PUBLISHED: dict[str, Any] = {
    "micro_batch": 8,
    "checkpointing": "blocks",
    "attention": "eager-fp32",
    "loss": "full-shifted",
    "optimizer": "adamw-foreach",
    "sharding": "zero2",
    "expandable_segments": False,
    "eval_batch": 4,
}


@pytest.fixture(scope="module")
def source(by_hand: Any) -> Any:
    return by_hand(by_hand.SIZE(blocks=4, vocabulary=4096, heads=16))


def published(keep: Collection[str] = (), **changes: Any) -> Case:
    return Case(recipe(8, 1, 128, **{**PUBLISHED, **changes}), frozenset(keep))


def search(case: Case, source: Any, share: float) -> Climbed:
    """The ladder on a card that has a share of what the recipe's own settings reserve."""
    reserved = case.model(source).predict(case.asked).reserved_peak_bytes
    model = case.model(source, card(int(share * reserved), case.recipe.hardware.gpus))
    return climb(model, case.asked, case.keep)


def rung_with(found: Climbed, case: Case, **knobs: Any) -> Rung:
    """The rung that has the settings asked for, but for some."""
    micro_batch = knobs.pop("micro_batch", case.asked.micro_batch)
    choice = with_micro_batch(replace(case.asked, **knobs), micro_batch, 4)
    (rung,) = (rung for rung in found.ladder if rung.choice == choice)
    return rung


def test_the_published_case_has_its_ways_out(source: Any) -> None:
    """Another attention at 8 × 2, that and chunked loss with more at a time, and the published 4 × 4, the slowest."""
    case = published()
    found = search(case, source, 0.75)
    assert found.choice is None
    attention = rung_with(found, case, attention="sdpa")
    both = rung_with(found, case, attention="sdpa", loss="chunked", micro_batch=16)
    cure = rung_with(found, case, micro_batch=4)
    assert both.samples_per_second > attention.samples_per_second > 2 * cure.samples_per_second
    assert [sorted(rung.changes) for rung in (attention, both, cure)] == [
        ["attention"],
        ["attention", "loss", "micro_batch"],
        ["micro_batch"],
    ]
    assert cure.changes["micro_batch"].startswith("8 × 2 becomes 4 × 4")
    assert "least change" in attention.named
    assert {rung.choice.effective_batch for rung in found.ladder} == {128}
    assert all(rung.exact and rung.choice.master_weights for rung in found.ladder)
    assert found.search.considered >= 10_000


def test_each_title_is_held_by_one_rung(source: Any) -> None:
    found = search(published(), source, 0.75)
    titles = [name for rung in found.ladder for name in rung.named]
    assert sorted(titles) == ["fastest", "least change", "least memory"]
    assert "fastest" in found.ladder[0].named
    least = min(found.ladder, key=lambda rung: rung.prediction.reserved_peak_bytes)
    assert "least memory" in least.named
    fewest = min(len(rung.changes) for rung in found.ladder)
    assert all(len(rung.changes) == fewest for rung in found.ladder if "least change" in rung.named)


def test_what_fits_as_asked_is_in_the_ladder_and_nothing_changes(source: Any) -> None:
    case = published()
    found = search(case, source, 1.1)
    assert found.choice == case.asked
    (rung,) = found.ladder
    assert rung.named == ("fastest", "least memory", "as asked")
    assert not rung.changes
    assert rung.exactness == "the configuration itself"
    assert found.unpinned is not None
    assert found.unpinned.samples_per_second > 2 * rung.samples_per_second
    assert found.unpinned.changes


def test_one_sample_for_each_gpu_is_enough_to_be_faster_without_pins(by_hand: Any) -> None:
    case = Case(recipe(8, 1, 8, checkpointing="blocks", eval_batch="none"), frozenset())
    found = search(case, by_hand(), 3.0)
    assert found.choice is not None
    assert found.choice.checkpointing == "blocks"
    assert found.unpinned is not None
    assert found.unpinned.choice.checkpointing == "none"


def test_without_pins_there_is_nothing_beyond_them(source: Any) -> None:
    case = Case(recipe(8, 1, 128), frozenset())
    found = search(case, source, 2.0)
    assert found.unpinned is None
    assert not any(rung.changes for rung in found.ladder)


@pytest.mark.parametrize("keep", [("micro_batch",), ("attention",), ("attention", "loss"), ("micro_batch", "sharding")])
def test_what_is_kept_never_changes(source: Any, keep: tuple[str, ...]) -> None:
    case = published(keep)
    found = search(case, source, 0.75)
    assert found.ladder
    for rung in found.ladder:
        assert not set(keep) & set(rung.changes)
        assert all(getattr(rung.choice, knob) == getattr(case.asked, knob) for knob in keep)


def test_where_all_that_helps_is_kept_the_nearest_is_named(source: Any) -> None:
    case = published(("attention", "micro_batch"))
    found = search(case, source, 0.2)
    assert (found.choice, found.ladder, found.unpinned) == (None, (), None)
    assert found.nearest is not None
    assert not found.nearest.prediction.fits
    assert found.nearest.prediction.failing_request is not None
    assert found.nearest.choice.attention == "eager-fp32"
    own = case.model(source).predict(case.asked).allocated_peak_bytes
    assert found.nearest.prediction.allocated_peak_bytes < own


def test_what_is_not_to_blame_is_no_way_out_by_itself(source: Any) -> None:
    """Where scores are the memory, an optimizer without temporaries may be just enough, and is no answer."""
    found = search(published(), source, 0.97)
    alone = [set(rung.changes) for rung in found.ladder if len(rung.changes) == 1]
    assert {"attention"} in alone
    assert {"optimizer"} not in alone


@pytest.mark.parametrize("own", EIGHT_BIT)
def test_the_ways_out_of_states_of_eight_bits_keep_them(by_hand: Any, own: str) -> None:
    case = Case(recipe(batch=8, optimizer=own, checkpointing="none", eval_batch="none"), frozenset(KNOBS) - {"checkpointing"})
    for keep in (case.keep - {"optimizer"}, case.keep - {"optimizer", "loss"}):
        found = search(replace(case, keep=keep), by_hand(), 0.8)
        assert found.ladder
        assert {rung.choice.optimizer for rung in found.ladder} <= {*EIGHT_BIT}
        assert all(rung.exact for rung in found.ladder)


def test_large_states_are_moved_where_they_are_to_blame(by_hand: Any) -> None:
    """To managed memory and not back, as a change by itself."""
    source = by_hand(by_hand.SIZE(blocks=4, width=1024, vocabulary=4096))
    pins = {"checkpointing": "none", "loss": "full", "micro_batch": 2, "eval_batch": "none"}
    alone = {}
    for own in EIGHT_BIT:
        found = search(Case(recipe(batch=8, optimizer=own, **pins), frozenset()), source, 0.9)
        changes = [rung.changes for rung in found.ladder if set(rung.changes) == {"optimizer"}]
        alone[own] = [words["optimizer"].partition(":")[0] for words in changes]
    assert alone == {"adamw-8bit": ["adamw-8bit becomes adamw-8bit-paged"], "adamw-8bit-paged": []}


# What is traced.


def test_single_samples_are_traced_only_where_two_do_not_fit(by_hand: Any) -> None:
    case = Case(recipe(batch=8, eval_batch="none"), frozenset())
    size = by_hand.SIZE(blocks=4, vocabulary=4096, inner=16)
    lean = replace(case.asked, checkpointing="blocks-offload", optimizer_offload=True)
    model = case.model(by_hand(size))
    one, two = (model.predict(with_micro_batch(lean, cut, "none")).reserved_peak_bytes for cut in (1, 2))
    for usable, singles in ((2 * two, False), ((one + two) // 2, True)):
        source = by_hand(size)
        found = climb(case.model(source, card(usable, 1)), case.asked, case.keep)
        assert found.ladder
        assert any(rung.choice.micro_batch == 1 for rung in found.ladder) == singles
        assert any(key.one_sample for key in source.made) == singles


def test_a_single_sample_that_two_rule_out_is_found(by_hand: Any) -> None:
    """Only one sample at a time fits: found, though its forms are made last."""
    case = Case(recipe(batch=4, eval_batch="none", checkpointing="none", attention="eager-fp32"), frozenset({"attention"}))
    source = by_hand(by_hand.SIZE(heads=16))
    least = case.model(source).predict(with_micro_batch(case.asked, 1, "none")).reserved_peak_bytes
    two = case.model(source).predict(with_micro_batch(case.asked, 2, "none")).reserved_peak_bytes
    found = climb(case.model(source, card((least + two) // 2, 1)), case.asked, case.keep)
    assert found.choice is not None
    assert (found.choice.micro_batch, found.choice.checkpointing) == (1, "none")


def test_without_formulas_only_the_batch_is_cut(by_hand: Any) -> None:
    """Each configuration takes a trace of its own then: knobs stay as asked."""
    case = Case(recipe(batch=8, checkpointing="blocks", eval_batch="none"), frozenset())
    source = by_hand(by_hand.SIZE(inner=16), closed=False)
    found = search(case, source, 0.8)
    assert found.ladder
    knobs = {replace(rung.choice, micro_batch=1, accumulation=1) for rung in found.ladder}
    assert knobs == {replace(case.asked, micro_batch=1, accumulation=1)}
    shapes = [key.shape for key in source.made if key.shape is not None]
    assert {shape[0] for shape in shapes} <= {1, 2, 3, 4, 8}
    assert found.search.considered == 8


@pytest.mark.parametrize(("vision", "searched"), [("frozen", {"blocks"}), (1e-4, {"none", "blocks"})])
def test_a_frozen_tower_is_not_searched(by_hand: Any, vision: Any, searched: set[str]) -> None:
    """It keeps nothing that could be recomputed."""
    source = by_hand(by_hand.SIZE(towers=2))
    case = Case(recipe(batch=4, eval_batch="none", train={"vision": vision}), frozenset())
    search(case, source, 2.0)
    assert {key.vision_checkpointing for key in source.made} == searched


LOOPS = {"model": "qwen2.5-vl-7b-instruct", "train": {"vision": 1e-4}, "eval_batch": "none"}


def test_few_images_at_a_time_are_traced_where_a_model_loops_over_them(by_hand: Any) -> None:
    """Each number of images takes a form of its own, the longer to trace the more they are."""
    case = Case(recipe(batch=16, micro_batch=4, **LOOPS), frozenset())
    source = by_hand(by_hand.SIZE(towers=2))
    found = climb(case.model(source, card(1 << 30, 1)), case.asked, case.keep)
    assert found.choice is not None
    assert {key.images for key in source.made} <= {1, -2, -3, -4}
    assert {(key.loss, key.vision_checkpointing) for key in source.made} == {(case.asked.loss, "blocks")}


def test_one_image_at_a_time_is_not_given_up_for_what_two_need(by_hand: Any) -> None:
    """A form of two images says nothing of one."""
    case = Case(recipe(batch=4, checkpointing="blocks", vision_checkpointing="none", micro_batch="auto", **LOOPS), frozenset())
    source = by_hand(by_hand.SIZE(towers=3, patches=1 << 14, width=64))
    model = case.model(source)
    plain = [with_micro_batch(case.asked, cut, "none") for cut in (1, 2)]
    one, two = (model.predict(choice).reserved_peak_bytes for choice in plain)
    assert two > 1.5 * one
    found = climb(case.model(source, card(int(1.02 * one), 1)), case.asked, {"optimizer_offload", "expandable_segments"})
    assert found.choice == plain[0]
