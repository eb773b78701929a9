"""The ladder of tiny models against brute force: every configuration of a small search space traced at its own shape."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomph.core.choices import cuts, micro_batch_sizes, resolve, with_micro_batch
from oomph.core.devices import Gpu, find_gpu, outside
from oomph.core.events import Events
from oomph.core.forms import FormKey, Traced
from oomph.core.ladder import climb
from oomph.core.predict import surely
from oomph.core.search import ALIKE, APART
from oomph.core.space import KNOBS
from oomph.core.stage import StageModel
from oomph.live.batch import images_of
from oomph.live.source import make_form, read_model_config
from oomph.recipe import Recipe
from oomph.records import Choice, Prediction

A100 = find_gpu("A100-SXM4-40GB")
TOKENS = 301
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
LLAVA = {
    "model_type": "llava",
    "image_token_index": 511,
    "text_config": {**LLAMA, "num_hidden_layers": 6},
    "vision_config": CLIP,
}
SEARCHED = {"llama": ("checkpointing", {"language", "head"}), "llava": ("vision_checkpointing", {"language", "head", "vision"})}
"""What is searched beside the cut of the batch and the allocator's settings, and what trains."""


class Forms:
    """Makes every form once; where they are not `closed`, each shape is traced by itself and with all layers."""

    def __init__(self, closed: bool) -> None:
        self._closed = closed
        self._made: dict[FormKey, Traced] = {}

    def prepare(self, keys: Sequence[FormKey]) -> None:
        for key in keys:
            self.traced(key)

    def traced(self, key: FormKey) -> Traced:
        if key not in self._made:
            if self._closed or key.shape is not None:
                self._made[key] = make_form(key)
            else:
                images = images_of(read_model_config(key), None) if key.images else None
                self._made[key] = Traced(None, images.tokens if images else 0, "not wanted")
        return self._made[key]


class Case:
    """A tiny model's stage: all configurations of its small space, and what traces at their shapes predict."""

    def __init__(self, name: str, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"llama": LLAMA, "llava": LLAVA}[name]))
        self.knob, trained = SEARCHED[name]
        parts = {"language", "head", "projector", "vision"} if name == "llava" else {"language", "head"}
        self.recipe = Recipe.model_validate(
            {
                "name": name,
                "model": str(folder),
                "data": {"max_tokens": TOKENS},
                "hardware": {"gpu": A100.name},
                "memory": {"eval_batch": "none"},
                "stages": [
                    {
                        "name": "tune",
                        "train": {part: 1e-4 if part in trained else "frozen" for part in sorted(parts)},
                        "effective_batch": 2,
                    }
                ],
            }
        )
        self.closed, self._direct = Forms(True), Forms(False)
        self.asked, _ = resolve(self.recipe.stages[0], self.recipe, A100)
        self.keep = {*KNOBS} - {self.knob, "expandable_segments"}
        self.choices = [
            with_micro_batch(replace(self.asked, **{self.knob: value, "expandable_segments": grown}), cut, "none")
            for value in KNOBS[self.knob]
            for grown in (False, True)
            for cut in cuts(self.asked, "none", every=True)
        ]
        direct = self.model(A100, self._direct)
        self.brute = {choice: direct.predict(choice) for choice in self.choices}

    def model(self, gpu: Gpu = A100, source: Any = None) -> StageModel:
        return StageModel(self.recipe, self.recipe.stages[0], gpu, source or self.closed)

    def card(self, usable: int) -> Gpu:
        return replace(A100, name="small", memory_bytes=usable + outside(A100, 1).bytes)

    def fitting(self, gpu: Gpu) -> list[Choice]:
        """Those that fit; where any do so with room for the error bound, those."""
        direct = self.model(gpu, self._direct)
        predictions = {choice: direct.predict(choice) for choice in self.choices}
        sure = [choice for choice, prediction in predictions.items() if surely(prediction)]
        return sure or [choice for choice, prediction in predictions.items() if prediction.fits]


@pytest.fixture(scope="module", params=sorted(SEARCHED))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def peaks(prediction: Prediction) -> tuple[Any, ...]:
    return prediction.allocated_peak_bytes, prediction.reserved_peak_bytes, prediction.phases, prediction.by_role


@pytest.mark.slow
def test_formulas_give_the_peaks_of_traces_at_every_shape(case: Case) -> None:
    """Of single samples, whose forms are others, only the configuration asked for."""
    model, own = case.model(), getattr(case.asked, case.knob)
    for choice, prediction in case.brute.items():
        if choice.micro_batch > 1 or getattr(choice, case.knob) == own:
            assert peaks(model.predict(choice)) == peaks(prediction), choice
            assert model.bound(choice) <= prediction.allocated_peak_bytes


@pytest.mark.slow
def test_the_ladder_is_what_brute_force_finds(case: Case) -> None:
    """On cards of the sizes at which another configuration begins to fit, and on one that is too small for all."""
    reserved = {choice: prediction.reserved_peak_bytes for choice, prediction in case.brute.items()}
    least = min(reserved.values())
    several = {nbytes for choice, nbytes in reserved.items() if choice.micro_batch > 1}
    for usable in [least - (2 << 20), least, *sorted(several)]:
        gpu = case.card(usable)
        model = case.model(gpu)
        found, fitting = climb(model, case.asked, case.keep), case.fitting(gpu)
        assert bool(found.ladder) == bool(fitting)
        assert (found.nearest is None) == bool(fitting)
        timed = [choice for choice in fitting if choice.micro_batch > 1] or [rung.choice for rung in found.ladder]
        if fitting:
            fastest = min(model.speed(choice).step_seconds for choice in timed)
            assert found.ladder[0].step_seconds <= fastest * (1 + ALIKE) / (1 - APART)
        for rung in found.ladder:
            assert rung.choice in fitting
            assert peaks(rung.prediction) == peaks(case.brute[rung.choice])
            assert sum(map(sum, micro_batch_sizes(rung.choice))) == case.asked.effective_batch


@pytest.mark.slow
def test_bounds_hold_under_every_sharding(case: Case) -> None:
    """On four GPUs of two machines, with the same forms."""
    hardware = case.recipe.hardware.model_copy(update={"gpus": 4, "nodes": 2})
    (stage,) = case.recipe.stages
    wide = stage.model_copy(update={"effective_batch": 8})
    recipe = case.recipe.model_copy(update={"hardware": hardware, "stages": (wide,)})
    model = StageModel(recipe, wide, A100, case.closed)
    asked, _ = resolve(wide, recipe, A100)
    for sharding, value, masters in itertools.product(KNOBS["sharding"], KNOBS[case.knob], (False, True)):
        if sharding == "none" or (sharding.startswith("zero") and not masters):
            continue
        choice = replace(asked, sharding=sharding, master_weights=masters, **{case.knob: value})
        assert choice.micro_batch > 1
        assert 0 < model.bound(choice) <= model.predict(choice).allocated_peak_bytes, choice
        halved = with_micro_batch(replace(choice, effective_batch=16), 2, "none")
        assert model.bound(choice) <= model.bound(halved) <= model.predict(halved).allocated_peak_bytes, halved


@pytest.mark.slow
def test_what_fits_one_sample_at_a_time_is_not_given_up(case: Case) -> None:
    """The form of several samples, by which single ones are judged, does not ask for more than they need."""
    for choice, prediction in case.brute.items():
        if choice.micro_batch == 1:
            assert case.model(case.card(prediction.reserved_peak_bytes)).may_fit(choice)


# Physics.

ACTIVATIONS = ("activation", "scores", "logits", "temporary", "input")


def alive_at_peak(events: Events) -> list[int]:
    """The storages of activations that are alive when there are most bytes of them, from the forward to the backward."""
    alive: dict[int, int] = {}
    best: list[int] = []
    total = most = 0
    for phase, entry in entries(events):
        storage = entry if entry >= 0 else ~entry
        if events.kinds[storage].role not in ACTIVATIONS:
            continue
        total += events.sizes[storage] if entry >= 0 else -events.sizes[storage]
        if entry >= 0:
            alive[storage] = entry
        else:
            alive.pop(storage)
        if phase != "optimizer" and total > most:
            most, best = total, list(alive)
    return best


def entries(events: Events) -> Iterator[tuple[str, int]]:
    """The timeline of a step as all later ones are, each entry with its phase."""
    for segment in events.segments:
        marks, phase = dict(segment.marks), ""
        for at, entry in enumerate(segment.timeline):
            phase = marks.get(at, phase)
            if segment.name.startswith("step/"):
                yield phase, entry


def explanation(events: Events, alive: Sequence[int], than: Events, than_alive: Sequence[int]) -> str:
    """The largest of what is alive at one peak and not at the other."""

    def found(source: Events, storages: Sequence[int]) -> Counter[tuple[str, str, str]]:
        made: Counter[tuple[str, str, str]] = Counter()
        for storage in storages:
            kind = source.kinds[storage]
            made[kind.op, kind.module, kind.phase] += source.sizes[storage]
        return made

    more = found(events, alive)
    more.subtract(found(than, than_alive))
    lines = [f"{n:+,} bytes of {op} in {module or 'no module'}, {phase}" for (op, module, phase), n in more.most_common(5)]
    return "\n".join(lines)


@pytest.mark.slow
def test_less_at_a_time_or_less_kept_never_needs_more_for_activations(case: Case) -> None:
    """Checkpointing from none to all blocks and to host memory, each with 2 to 5 samples at a time."""
    model = case.model()
    batch = replace(case.asked, effective_batch=12)
    made: dict[tuple[Any, int], Events] = {}
    for value in KNOBS[case.knob]:
        for samples in range(2, 6):
            made[value, samples] = model.lay_out(with_micro_batch(replace(batch, **{case.knob: value}), samples, "none")).events
    peak = {key: alive_at_peak(events) for key, events in made.items()}
    size = {key: sum(made[key].sizes[storage] for storage in storages) for key, storages in peak.items()}
    pairs = [((value, less), (value, less + 1)) for value in KNOBS[case.knob] for less in range(2, 5)]
    pairs += [((lean, n), (fat, n)) for fat, lean in itertools.pairwise(KNOBS[case.knob]) for n in range(2, 6)]
    for lean, fat in pairs:
        because = explanation(made[lean], peak[lean], made[fat], peak[fat])
        assert size[lean] <= size[fat], f"{lean} has {size[lean]:,} bytes of activations, {fat} has {size[fat]:,}:\n{because}"
