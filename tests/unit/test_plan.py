"""From a recipe to a plan, with forms written by hand: what is asked of the source, and what is made of its answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomph.core.choices import micro_batch_candidates
from oomph.core.closed_form import FEATURES, LEAST_ROWS, ClosedForm, Dimension, Family, Formula
from oomph.core.devices import Gpu, find_gpu, outside
from oomph.core.forms import FormKey, Traced
from oomph.core.plan import make_plan
from oomph.core.stage import LOOPS_OVER_IMAGES
from oomph.errors import UserError
from oomph.recipe import Recipe
from oomph.records import Plan, StagePlan
from oomph.units import GIB, MIB

TOKENS, IMAGE_TOKENS = 1024, 576
PARTS = {"vision": "clip-vit-large-patch14-336-vision", "projector": "mlp2x_gelu", "language": "phi-2"}


class FakeSource:
    """Serves one form for every family of shapes, or, where it is not closed, one at each shape that is asked for."""

    def __init__(self, form: ClosedForm, closed: bool = True) -> None:
        self.form, self.closed = form, closed
        self.prepared: list[FormKey] = []
        self.asked: list[FormKey] = []

    def prepare(self, keys: Sequence[FormKey]) -> None:
        self.prepared += keys

    def traced(self, key: FormKey) -> Traced:
        self.asked.append(key)
        tokens = IMAGE_TOKENS if key.images else 0
        if key.shape is not None:
            return Traced(at_shape(self.form, key.shape), tokens, "traced at this very shape")
        return Traced(self.form if self.closed else None, tokens, "closed form" if self.closed else "no closed form: because")

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes that were traced by themselves, each once."""
        return list(dict.fromkeys(key.shape for key in self.asked if key.shape is not None))

    def families(self) -> list[Family]:
        """The families of all that was asked for, each once."""
        return list(dict.fromkeys(Family(key.one_sample, key.images) for key in self.asked))


def at_shape(form: ClosedForm, shape: tuple[int, ...]) -> ClosedForm:
    """The form without its variables."""
    dimensions = form.dimensions(shape).tolist()
    fixed = [
        formula._replace(dimensions=tuple(Dimension(0, extent, 0) for extent in row[: len(formula.dimensions)]))
        for formula, row in zip(form.formulas, dimensions, strict=True)
    ]
    return replace(form, formulas=fixed)


@pytest.fixture
def source(toy: ClosedForm) -> FakeSource:
    return FakeSource(toy)


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Gpu]:
    """Puts a card in the place of every other, of which the allocator can have so many bytes."""

    def install(usable: int) -> Gpu:
        whole = find_gpu("A100-SXM4-40GB")
        gpu = replace(whole, name="small", memory_bytes=usable + outside(whole, 1).bytes)
        monkeypatch.setattr("oomph.core.plan.find_gpu", lambda name: gpu)
        return gpu

    return install


def recipe(
    model: Any = "llama-3.1-8b", batch: int = 8, stages: Sequence[str] = ("tune",), data: Any = None, **memory: Any
) -> Recipe:
    pinned = {"checkpointing": "none", "eval_batch": "none"}
    return Recipe.model_validate(
        {
            "name": "small",
            "model": model,
            "data": {"max_tokens": TOKENS, **(data or {})},
            "hardware": {"gpu": "A100-SXM4-40GB"},
            "memory": {**pinned, **memory},
            "stages": [
                {"name": name, "train": {"language": 1e-4, "vision": "frozen", "head": "frozen"}, "effective_batch": batch}
                for name in stages
            ],
        }
    )


def test_a_stage_says_what_it_is_planned_for(source: FakeSource) -> None:
    plan = make_plan(recipe(micro_batch=2, batch=8), source)
    (stage,) = plan.stages
    assert (plan.recipe, plan.gpu, plan.gpus, plan.fits) == ("small", "A100-SXM4-40GB", 1, True)
    assert set(plan.versions) == {"torch", "transformers"}
    assert (stage.name, stage.choice.micro_batch, stage.choice.accumulation) == ("tune", 2, 4)
    assert (stage.trainable_parameters, stage.total_parameters) == (1024 * 256, 1024 * 256 + 256 * 256)
    assert (stage.samples_tokens, stage.image_tokens) == (TOKENS, 0)
    assert stage.traced == "closed form"
    assert stage.prediction.by_role["scores"] == 2 * 4 * TOKENS * TOKENS * 4


def test_a_plan_survives_json(source: FakeSource) -> None:
    plan = make_plan(recipe(stages=("one", "two"), micro_batch=2), source)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


# The largest micro-batch that fits.


def needs(source: FakeSource, micro_batch: int, **more: Any) -> int:
    """What a card must have at the least, by trying."""
    prediction = make_plan(recipe(micro_batch=micro_batch, **more), source).stages[0].prediction
    return prediction.reserved_peak_bytes


CUTS = micro_batch_candidates(8)


@pytest.mark.parametrize("fitting", CUTS)
def test_auto_takes_the_largest_that_fits(source: FakeSource, small_card: Callable[[int], Gpu], fitting: int) -> None:
    room = needs(source, fitting)
    assert [cut for cut in CUTS if needs(source, cut) <= room] == [cut for cut in CUTS if cut <= fitting]
    small_card(room)
    (stage,) = make_plan(recipe(), source).stages
    assert stage.choice.micro_batch == fitting
    assert stage.choice.accumulation == -(-8 // fitting)
    assert stage.prediction.fits
    larger = [cut for cut in CUTS if cut > fitting]
    reason = f"{larger[-1]} does not fit on small" if larger else "all samples of a GPU at once"
    assert stage.reasons["micro_batch"] == f"the largest cut that fits: {reason}"


def test_auto_that_finds_none_says_so(source: FakeSource, small_card: Callable[[int], Gpu]) -> None:
    small_card(30 * MIB)
    (stage,) = make_plan(recipe(), source).stages
    assert stage.choice.micro_batch == 1
    assert not stage.prediction.fits
    assert stage.prediction.failing_request is not None
    assert stage.reasons["micro_batch"] == "the smallest cut; not even this one fits on small"


def test_auto_minds_the_evaluation(source: FakeSource, small_card: Callable[[int], Gpu]) -> None:
    """An evaluated batch as large as the micro-batch is a reason for a smaller one, where it needs more room."""
    room = needs(source, 4)
    small_card(room)
    assert make_plan(recipe(), source).stages[0].choice.micro_batch == 4
    (stage,) = make_plan(recipe(eval_batch=16), source).stages
    assert stage.choice.micro_batch == 1
    assert not stage.prediction.fits
    (stage,) = make_plan(recipe(eval_batch="auto"), source).stages
    assert stage.choice.eval_batch == stage.choice.micro_batch


def test_a_pinned_micro_batch_stays(source: FakeSource, small_card: Callable[[int], Gpu]) -> None:
    small_card(60 * MIB)
    (stage,) = make_plan(recipe(micro_batch=8), source).stages
    assert stage.choice.micro_batch == 8
    assert not stage.prediction.fits


# The ladder.


def searched(source: FakeSource, wanted: Recipe, keep: Sequence[str] = ()) -> StagePlan:
    (stage,) = make_plan(wanted, source, ladder=True, keep=keep).stages
    return stage


def test_without_a_search_there_is_no_ladder(source: FakeSource) -> None:
    (stage,) = make_plan(recipe(), source).stages
    assert (stage.ladder, stage.unpinned, stage.nearest, stage.search) == ((), None, None, None)
    assert stage.speed is not None


def test_a_search_takes_the_fastest_that_fits(source: FakeSource) -> None:
    stage = searched(source, recipe())
    first = stage.ladder[0]
    assert (stage.choice, stage.prediction) == (first.choice, first.prediction)
    assert stage.speed is not None
    assert stage.speed.step_seconds == first.step_seconds
    assert "fastest" in first.named
    assert stage.reasons["micro_batch"] == "the fastest configuration that fits has it"
    assert stage.reasons["checkpointing"] == "pinned by memory.checkpointing"
    assert set(stage.reasons) >= set(vars(stage.choice))


def test_where_the_pins_do_not_fit_the_plan_is_as_asked_and_the_ladder_says_what_would(
    source: FakeSource, small_card: Callable[[int], Gpu]
) -> None:
    small_card(needs(source, 2))
    stage = searched(source, recipe(micro_batch=8))
    assert stage.choice.micro_batch == 8
    assert not stage.prediction.fits
    assert stage.ladder
    assert all("micro_batch" in rung.changes and rung.prediction.fits for rung in stage.ladder)
    stage = searched(source, recipe(micro_batch=8), ["micro_batch"])
    assert not stage.ladder
    assert stage.nearest is not None
    assert stage.nearest.choice.micro_batch == 8


def test_a_plan_with_its_ladder_survives_json(source: FakeSource, small_card: Callable[[int], Gpu]) -> None:
    small_card(needs(source, 2))
    for wanted in (recipe(), recipe(micro_batch=8)):
        plan = make_plan(wanted, source, ladder=True)
        assert plan.stages[0].ladder
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_only_what_a_search_varies_can_be_kept(source: FakeSource) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(recipe(), source, ladder=True, keep=["precision", "micro_batch", "gpus"])
    assert caught.value.problems == ["a search does not vary precision", "a search does not vary gpus"]
    assert "micro_batch" in caught.value.hint
    assert not source.asked


# Stages.


def test_all_stages_are_planned_or_those_that_are_named(source: FakeSource) -> None:
    three = recipe(stages=("align", "finetune", "moe"), micro_batch=2)
    assert [stage.name for stage in make_plan(three, source).stages] == ["align", "finetune", "moe"]
    assert [stage.name for stage in make_plan(three, source, ["moe", "align"]).stages] == ["moe", "align"]
    with pytest.raises(UserError, match="there is no stage 'alin'"):
        make_plan(three, source, ["alin"])


def test_what_all_stages_need_first_is_prepared_at_once(source: FakeSource) -> None:
    three = recipe(stages=("align", "finetune", "moe"), micro_batch=2, eval_batch=1)
    make_plan(three, source)
    families = [Family(key.one_sample, key.images) for key in source.prepared]
    assert families == [Family(False, 0), Family(True, 0)] * 3
    assert set(source.asked) <= set(source.prepared)


def test_a_mistake_in_a_later_stage_stops_before_anything_is_traced(source: FakeSource) -> None:
    wrong = recipe(stages=("one", "two"), micro_batch=2)
    two = wrong.stages[1].model_copy(update={"effective_batch": 1})
    with pytest.raises(UserError, match="stage two: micro_batch 2 is larger"):
        make_plan(wrong.model_copy(update={"stages": (wrong.stages[0], two)}), source)
    assert not source.prepared
    assert not source.asked


# Images.


def sees(**more: Any) -> Recipe:
    """A recipe of a model that takes images of one size."""
    return recipe(PARTS, **more)


@pytest.mark.parametrize(
    ("images", "micro_batch", "family"),
    [
        (0, 1, Family(True, 0)),
        (0, 4, Family(False, 0)),
        (1, 1, Family(True, 1)),
        (1, 4, Family(False, 2)),
        (3, 1, Family(True, 2)),
    ],
)
def test_a_form_is_asked_for_by_its_family(source: FakeSource, images: int, micro_batch: int, family: Family) -> None:
    make_plan(sees(micro_batch=micro_batch, data={"images_per_sample": images, "max_tokens": 4096}), source)
    assert source.families() == [family]
    assert not source.shapes()


def test_a_model_that_sees_nothing_gets_no_images(source: FakeSource) -> None:
    (stage,) = make_plan(recipe(micro_batch=2, data={"images_per_sample": 5}), source).stages
    assert source.families() == [Family(False, 0)]
    assert (stage.samples_tokens, stage.image_tokens) == (TOKENS, 0)


def test_image_tokens_count_or_come_on_top(source: FakeSource) -> None:
    (stage,) = make_plan(sees(micro_batch=1), source).stages
    assert (stage.samples_tokens, stage.image_tokens) == (TOKENS, IMAGE_TOKENS)
    (stage,) = make_plan(sees(micro_batch=1, data={"image_tokens_count": False, "images_per_sample": 2}), source).stages
    assert (stage.samples_tokens, stage.image_tokens) == (TOKENS + 2 * (IMAGE_TOKENS - 1), 2 * IMAGE_TOKENS)


def test_images_that_do_not_fit_into_a_sample_are_refused(source: FakeSource) -> None:
    with pytest.raises(UserError, match=r"data\.images_per_sample 2 of 576 tokens each do not fit") as caught:
        make_plan(sees(micro_batch=1, data={"images_per_sample": 2}), source)
    assert "1152" in caught.value.hint


def test_a_model_that_loops_over_images_has_a_form_for_each_number(source: FakeSource) -> None:
    wide = {"max_tokens": 8192}
    make_plan(recipe("qwen2.5-vl-7b-instruct", micro_batch=4, data=wide), source)
    make_plan(recipe("qwen2.5-vl-7b-instruct", micro_batch=2, data={"images_per_sample": 3, **wide}), source)
    make_plan(recipe("qwen2.5-vl-7b-instruct", micro_batch=1, data=wide), source)
    assert source.families() == [Family(False, -4), Family(False, -6), Family(True, 1)]
    assert "llava" not in LOOPS_OVER_IMAGES


def test_a_model_that_loops_over_images_is_evaluated_with_a_form_of_its_own(source: FakeSource) -> None:
    make_plan(recipe("qwen2.5-vl-7b-instruct", micro_batch=2, eval_batch=4), source)
    assert source.families() == [Family(False, -2), Family(False, -4)]


# Evaluations of another family, and models without a closed form.


def test_an_evaluation_of_another_family_takes_another_form(source: FakeSource) -> None:
    (stage,) = make_plan(recipe(micro_batch=1, eval_batch=4), source).stages
    assert source.families() == [Family(True, 0), Family(False, 0)]
    assert stage.prediction.evaluation is not None
    (same,) = make_plan(recipe(micro_batch=4, eval_batch=4), source).stages
    assert same.prediction.evaluation is not None
    assert stage.prediction.evaluation.allocated_peak_bytes == same.prediction.evaluation.allocated_peak_bytes


def test_a_model_without_a_form_is_traced_at_its_shape(toy: ClosedForm) -> None:
    open_source = FakeSource(toy, closed=False)
    (stage,) = make_plan(recipe(micro_batch=2), open_source).stages
    assert open_source.shapes() == [(2, TOKENS, 0)]
    (closed,) = make_plan(recipe(micro_batch=2), FakeSource(toy)).stages
    assert stage.prediction == closed.prediction
    assert stage.traced == "traced at this very shape; no closed form: because"


def test_a_model_without_a_form_is_traced_at_every_cut_that_is_tried(toy: ClosedForm, small_card: Callable[[int], Gpu]) -> None:
    small_card(needs(FakeSource(toy), 2))
    open_source = FakeSource(toy, closed=False)
    (stage,) = make_plan(recipe(), open_source).stages
    assert stage.choice.micro_batch == 2
    assert open_source.shapes() == [(cut, TOKENS, 0) for cut in CUTS if cut >= 2]


@pytest.mark.parametrize("eval_batch", [2, 8])
def test_a_model_without_a_form_is_evaluated_at_its_own_shape(toy: ClosedForm, eval_batch: int) -> None:
    wanted = recipe(micro_batch=4, eval_batch=eval_batch)
    (stage,), (closed,) = (make_plan(wanted, FakeSource(toy, closed)).stages for closed in (False, True))
    assert stage.prediction.evaluation is not None
    assert closed.prediction.evaluation is not None
    assert stage.prediction.evaluation.allocated_peak_bytes == closed.prediction.evaluation.allocated_peak_bytes


def in_chunks(form: ClosedForm) -> FakeSource:
    """A source of a form whose loss is computed in chunks."""
    form.formulas.append(Formula((Dimension(FEATURES.index("chunk"), 1, 0),), 1))
    return FakeSource(form)


def test_fewer_tokens_than_the_loss_has_chunks_for_are_traced_at_their_shape(toy: ClosedForm) -> None:
    few = LEAST_ROWS // 2 - 1
    source = in_chunks(toy)
    (stage,) = make_plan(recipe(micro_batch=2, data={"max_tokens": few}), source).stages
    assert source.shapes() == [(2, few, 0)]
    assert stage.prediction.fits
    make_plan(recipe(micro_batch=2, data={"max_tokens": few + 1}), source)
    assert source.shapes() == [(2, few, 0)]


def test_fewer_tokens_with_a_loss_in_one_piece_need_no_trace(source: FakeSource) -> None:
    make_plan(recipe(micro_batch=2, data={"max_tokens": LEAST_ROWS // 2 - 1}), source)
    assert source.shapes() == []


def test_tokens_for_which_no_mask_is_padded_are_traced_at_their_shape(toy: ClosedForm) -> None:
    """A form that pads masks was made from tokens that are no multiple of 8; its layers are known to repeat."""
    kind = toy.kinds[0]._replace(op="aten.constant_pad_nd.default")
    toy.kinds.append(kind)
    toy.formulas.append(Formula((Dimension(FEATURES.index("ceil8(tokens)"), 1, 0),), 1))
    toy.kind[0], toy.formula[0] = len(toy.kinds) - 1, len(toy.formulas) - 1
    source = FakeSource(toy)
    make_plan(recipe(micro_batch=2, data={"max_tokens": 2051}), source)
    assert source.shapes() == []
    make_plan(recipe(micro_batch=2, data={"max_tokens": 2048}), source)
    assert source.shapes() == [(2, 2048, 0)]
    assert source.asked[-1].periodic


def test_a_shape_that_was_traced_by_itself_is_said_to_be(toy: ClosedForm) -> None:
    (stage,) = make_plan(recipe(micro_batch=2, data={"max_tokens": 100}), in_chunks(toy)).stages
    assert stage.traced == "traced at this very shape"


# What the key says.


def test_the_key_holds_what_the_recipe_says(source: FakeSource) -> None:
    experts = {"count": 4, "top_k": 2, "layers": "all"}
    rules = {"vision": "frozen", "projector": 1e-3, "language:*.mlp.*": 1e-4, "language:!*.mlp.*": "frozen", "head": 1e-5}
    whole = sees(micro_batch=2, attention="eager", loss="full", optimizer="adamw-loop", data={"image_size": [336, 448]})
    stage = whole.stages[0].model_copy(
        update={"train": rules, "experts": Recipe.model_validate(_with_experts(whole, experts)).stages[0].experts}
    )
    make_plan(whole.model_copy(update={"stages": (stage,)}), source)
    key = source.asked[0]
    assert key.model is None
    assert Path(str(key.vision)).name == PARTS["vision"]
    assert Path(str(key.language)).name == "phi-2"
    assert (key.projector, key.vision_feature_layer, key.vision_feature_select) == ("mlp2x_gelu", -2, "patch")
    assert json.loads(key.experts).items() >= {"count": 4, "top_k": 2, "layers": "all"}.items()
    assert key.trained == ("projector", "language:*.mlp.*", "head")
    assert key.frozen == ("vision", "language:!*.mlp.*")
    assert (key.attention, key.loss, key.optimizer, key.checkpointing) == ("eager", "full", "adamw-loop", "none")
    assert (key.precision, key.capability, key.image_size) == ("bfloat16", (8, 0), (336, 448))
    assert key.shape is None


def _with_experts(whole: Recipe, experts: dict[str, Any]) -> dict[str, Any]:
    data = whole.model_dump(exclude_unset=True)
    data["stages"] = [{**stage, "experts": experts} for stage in data["stages"]]
    return data


@pytest.mark.parametrize(
    ("experts", "balance", "said"),
    [
        ({"count": 4}, None, ["4 experts in all layers, 2 for each token"]),
        (
            {"count": [4, 8, 4], "layers": [0, 2, 4], "residual": True, "noise": 0.01},
            {"kind": "group", "group": 4, "z_loss": 0.001},
            [
                "4 to 8 experts in 3 listed layers, 2 for each token, beside the dense block, "
                "with noise of 0.01 standard deviations",
                "their load evened within groups of 4 samples, coefficient 0.01, z-loss 0.001",
            ],
        ),
        (
            {"count": 4, "dispatch": "capacity"},
            {"kind": "micro-batch"},
            [
                "4 experts in all layers, 2 for each token, through dense tensors that hold 1.5 times an even load, and drop "
                "the rest",
                "their load evened within each micro-batch, coefficient 0.01",
            ],
        ),
        ({"count": 4}, {"kind": "bias"}, None),
    ],
)
def test_a_plan_says_what_becomes_of_the_model(
    experts: dict[str, Any], balance: dict[str, Any] | None, said: list[str] | None, source: FakeSource
) -> None:
    whole = sees(micro_batch=2)
    data = _with_experts(whole, {"top_k": 2, "layers": "all", **experts})
    data["stages"] = [{**stage, "balance": balance} for stage in data["stages"]]
    changed = Recipe.model_validate(data)
    (stage,) = make_plan(changed, source).stages
    assert list(stage.made) == (said or [stage.made[0], "their load evened by biases that move by 0.001 a step"])
    wanted = changed.stages[0].balance
    assert source.asked[0].balance == ("" if wanted is None else wanted.model_dump_json())


def test_one_number_is_a_square(source: FakeSource) -> None:
    make_plan(sees(micro_batch=2, data={"image_size": 224}), source)
    assert source.asked[0].image_size == (224, 224)


def test_learning_rates_and_batches_share_a_form(source: FakeSource) -> None:
    """What does not change the trace does not make another key."""
    for batch, rate in ((8, 1e-4), (16, 1e-5)):
        wanted = recipe(micro_batch=2, batch=batch)
        stage = wanted.stages[0].model_copy(update={"train": {"language": rate, "vision": "frozen", "head": "frozen"}})
        make_plan(wanted.model_copy(update={"stages": (stage,)}), source)
    assert len(set(source.asked)) == 1


# What cannot be planned.


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (lambda: recipe("llama-99b"), "the model 'llama-99b' is not catalogued"),
        (lambda: recipe({**PARTS, "language": "phi-99"}), "the model 'phi-99' is not catalogued"),
        (lambda: recipe(micro_batch=9), "micro_batch 9 is larger than the 8 samples"),
        (lambda: recipe(sharding="zero2"), "sharding zero2 is not possible with hardware.gpus 1"),
    ],
    ids=["model", "part", "batch", "sharding"],
)
def test_what_is_not_known_is_refused_before_anything_is_traced(
    source: FakeSource, wanted: Callable[[], Recipe], problem: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(wanted(), source)
    assert problem in str(caught.value)
    assert not source.prepared


def test_an_unknown_card_is_refused(source: FakeSource) -> None:
    wanted = recipe()
    hardware = wanted.hardware.model_copy(update={"gpu": "A1000000"})
    with pytest.raises(UserError, match="is not in the catalogue"):
        make_plan(wanted.model_copy(update={"hardware": hardware}), source)


def test_a_local_folder_is_a_model(source: FakeSource, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    assert make_plan(recipe(str(tmp_path), micro_batch=1), source).fits
    assert source.asked[0].model == str(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": 3}', "\x00"])
def test_a_folder_without_a_configuration_is_refused(source: FakeSource, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        make_plan(recipe(str(tmp_path)), source)


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_few_and_many_tokens_are_planned(source: FakeSource, tokens: int) -> None:
    (stage,) = make_plan(recipe(micro_batch=1, batch=1, data={"max_tokens": tokens}), source).stages
    assert stage.samples_tokens == tokens
    assert stage.prediction.fits == (tokens == 1)
    assert stage.prediction.allocated_peak_bytes > (4 * tokens**2 * 4 if tokens > 1 else 0)


def test_more_bytes_than_there_are_addresses_are_refused(source: FakeSource) -> None:
    with pytest.raises(UserError, match="needs more than"):
        make_plan(recipe(micro_batch=1, data={"max_tokens": 10**12}), source)


def test_a_run_on_several_gpus_is_one_rank(source: FakeSource) -> None:
    wanted = recipe(micro_batch=2, batch=16)
    hardware = wanted.hardware.model_copy(update={"gpus": 4})
    (stage,) = make_plan(wanted.model_copy(update={"hardware": hardware}), source).stages
    assert (stage.choice.sharding, stage.choice.gpus, stage.choice.accumulation) == ("ddp", 4, 2)
    assert stage.prediction.by_role["communication"] >= 1024 * 256 * 2
    assert stage.prediction.usable_bytes < find_gpu("A100-SXM4-40GB").memory_bytes - GIB
