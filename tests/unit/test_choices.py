from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from oomph.core.choices import micro_batch_candidates, micro_batch_sizes, resolve, sample_tokens
from oomph.errors import UserError
from oomph.recipe import Data, Recipe, data_of, load, override, stage_of
from oomph.records import Choice


@dataclass(frozen=True)
class Card:
    name: str
    compute_capability: tuple[int, int] | None


A100 = Card("A100-SXM4-40GB", (8, 0))
T4 = Card("T4", (7, 5))


def recipe(effective_batch: int = 16, gpus: int = 1, **memory: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "model": "phi-2",
            "data": {"max_tokens": 512},
            "hardware": {"gpu": "A100-SXM4-40GB", "gpus": gpus},
            "memory": memory,
            "stages": [{"name": "tune", "train": {"language": 1e-4}, "effective_batch": effective_batch}],
        }
    )


def solve(wanted: Recipe, card: Card = A100, **more: Any) -> tuple[Choice, dict[str, str]]:
    return resolve(wanted.stages[0], wanted, card, **more)


def refused(wanted: Recipe, card: Card = A100) -> UserError:
    with pytest.raises(UserError) as caught:
        solve(wanted, card)
    assert all(problem.startswith("stage tune: ") for problem in caught.value.problems)
    return caught.value


def test_every_value_has_a_reason() -> None:
    choice, reasons = solve(recipe())
    assert set(reasons) == {field.name for field in fields(choice)} | {"samples_per_gpu", "last_micro_batch"}
    assert all(reasons.values())


def test_what_is_left_open_is_decided() -> None:
    choice, _ = solve(recipe())
    assert choice == Choice(
        micro_batch=16,
        accumulation=1,
        effective_batch=16,
        checkpointing="blocks",
        loss="chunked",
        eval_batch=16,
    )
    assert solve(recipe(gpus=4))[0].sharding == "ddp"
    choice, reasons = solve(recipe(), T4)
    assert choice.precision == "float32"
    assert "compute capability 7.5" in reasons["precision"]


def test_what_is_pinned_stays() -> None:
    pinned: dict[str, Any] = {
        "micro_batch": 2,
        "checkpointing": "none",
        "attention": "eager",
        "loss": "full",
        "precision": "float32",
        "optimizer": "adamw-loop",
        "sharding": "zero3",
        "expandable_segments": True,
        "eval_batch": 3,
    }
    choice, reasons = solve(recipe(gpus=2, **pinned))
    assert {name: getattr(choice, name) for name in pinned} == pinned
    assert {reasons[name] for name in pinned} == {f"pinned by memory.{name}" for name in pinned}
    assert choice.accumulation == 4


def test_the_reason_says_where_a_knob_is_pinned() -> None:
    published = load("moe-llava/phi2-clip336-as-published")
    choice, reasons = resolve(stage_of(published, "align"), published, A100)
    assert (choice.micro_batch, choice.accumulation) == (32, 1)
    assert reasons["micro_batch"] == "pinned by stages.align.memory.micro_batch"
    assert reasons["sharding"] == "pinned by memory.sharding"


@pytest.mark.parametrize(("name", "micro_batch", "accumulation"), [("align", 32, 1), ("finetune", 8, 2), ("moe", 8, 2)])
def test_the_published_recipe_resolves_to_the_published_numbers(name: str, micro_batch: int, accumulation: int) -> None:
    published = load("moe-llava/phi2-clip336-as-published")
    choice, _ = resolve(stage_of(published, name), published, A100)
    assert choice == Choice(
        micro_batch=micro_batch,
        accumulation=accumulation,
        effective_batch=256 if name == "align" else 128,
        gpus=8,
        checkpointing="blocks",
        attention="eager-fp32",
        loss="full-shifted",
        precision="bfloat16",
        optimizer="adamw-foreach",
        sharding="zero2",
        expandable_segments=False,
        eval_batch=4,
    )


def test_a_smaller_micro_batch_accumulates_more() -> None:
    published = override(load("moe-llava/phi2-clip336-as-published"), ["micro_batch=4"])
    choice, _ = resolve(stage_of(published, "finetune"), published, A100)
    assert (choice.micro_batch, choice.accumulation, choice.effective_batch) == (4, 4, 128)


def test_ours_resolves_too() -> None:
    ours = load("moe-llava/phi2-clip336")
    for stage in ours.stages:
        assert resolve(stage, ours, A100)[0].sharding == "zero2"


def test_evaluation_may_be_left_out() -> None:
    assert solve(recipe(eval_batch="none"))[0].eval_batch is None


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    asked: list[int] = []

    def fits(choice: Choice) -> bool:
        asked.append(choice.micro_batch)
        return choice.micro_batch <= 4

    choice, reasons = solve(recipe(16), fits=fits)
    assert asked == [16, 8, 6, 4]
    assert (choice.micro_batch, choice.accumulation, choice.eval_batch) == (4, 4, 4)
    assert reasons["micro_batch"] == "the largest cut that fits: 6 does not fit on A100-SXM4-40GB"
    assert "all samples" in solve(recipe(16), fits=lambda _: True)[1]["micro_batch"]


def test_where_nothing_fits_the_smallest_is_taken() -> None:
    choice, reasons = solve(recipe(16), fits=lambda _: False)
    assert choice.micro_batch == 1
    assert "not even this one fits" in reasons["micro_batch"]


def test_a_pinned_micro_batch_is_not_asked_about() -> None:
    assert solve(recipe(16, micro_batch=8), fits=lambda _: False)[0].micro_batch == 8


def test_zero_is_offered_equal_cuts_only() -> None:
    asked: list[int] = []
    solve(recipe(24, gpus=2, sharding="zero1"), fits=lambda choice: bool(asked.append(choice.micro_batch)))
    assert asked == [12, 6, 4, 3, 2, 1]


def test_the_candidates_are_the_cuts() -> None:
    for samples in range(1, 200):
        cuts = {-(-samples // accumulation) for accumulation in range(1, samples + 1)}
        assert micro_batch_candidates(samples) == sorted(cuts, reverse=True)


def test_the_candidates_of_a_huge_batch_are_few() -> None:
    assert len(micro_batch_candidates(10**8)) < 20_001


@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 300) | st.none())
def test_sharing_loses_no_sample_and_keeps_the_gpus_in_step(effective_batch: int, gpus: int, micro_batch: int | None) -> None:
    wanted = recipe(effective_batch, gpus, micro_batch=micro_batch or "auto")
    try:
        choice, _ = solve(wanted)
    except UserError:
        assume(False)
    sizes = micro_batch_sizes(choice)
    assert sum(map(sum, sizes)) == choice.effective_batch == effective_batch
    assert len(sizes) == gpus
    assert {len(cut) for cut in sizes} == {choice.accumulation}
    assert min(map(min, sizes)) >= 1
    assert max(map(max, sizes)) == choice.micro_batch
    shares = [sum(cut) for cut in sizes]
    assert max(shares) - min(shares) <= 1


@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 40) | st.none(), st.booleans())
def test_a_batch_is_refused_only_where_no_cut_exists(batch: int, gpus: int, micro_batch: int | None, zero: bool) -> None:
    assume(not zero or gpus > 1)
    sharding = {"sharding": "zero2"} if zero else {}
    most, least = -(-batch // gpus), batch // gpus
    if zero:
        possible = batch % (gpus * (micro_batch or 1)) == 0
    else:
        cuts = [micro_batch] if micro_batch else range(1, most + 1)
        possible = any(m <= most and least >= -(-most // m) for m in cuts)
    wanted = recipe(batch, gpus, micro_batch=micro_batch or "auto", **sharding)
    if possible:
        choice, _ = solve(wanted)
        assert not zero or choice.micro_batch * choice.accumulation * gpus == batch
    else:
        assert len(refused(wanted).problems) == 1


@given(st.integers(1, 200), st.integers(2, 12), st.integers(1, 12), st.booleans())
def test_the_batches_that_are_named_do_work(batch: int, gpus: int, micro_batch: int, zero: bool) -> None:
    sharding = {"sharding": "zero2"} if zero else {}
    try:
        solve(recipe(batch, gpus, micro_batch=micro_batch, **sharding))
    except UserError as error:
        (problem,) = error.problems
        assume("nearest" in problem)
    else:
        assume(False)
    nearest = [int(word) for word in problem.split("nearest")[1].replace(",", "").split() if word.isdigit()]
    assert nearest
    for other in nearest:
        solve(recipe(other, gpus, micro_batch=min(micro_batch, -(-other // gpus)), **sharding))


@pytest.mark.parametrize(
    ("wanted", "card", "says"),
    [
        (recipe(128, 8, micro_batch=32), A100, "micro_batch 32 is larger than the 16 samples that a GPU gets of "),
        (recipe(8, micro_batch=9), A100, "micro_batch 9 is larger than the 8 samples"),
        (recipe(4, 8), A100, "effective_batch 4 leaves some of the 8 GPUs without a sample; the nearest that does not is 8"),
        (recipe(17, 8, micro_batch=1), A100, "the nearest that can are 16 and 24"),
        (recipe(17, 8, sharding="zero2"), A100, "equal shares alone on 8 GPUs, as ZeRO in DeepSpeed needs; "),
        (recipe(17, 8, sharding="zero2"), A100, "the nearest that can are 16 and 24"),
        (recipe(128, 8, sharding="zero2", micro_batch=12), A100, "cut into micro-batches of 12 alone on 8 GPUs"),
        (recipe(128, 8, sharding="zero2", micro_batch=12), A100, "the nearest that can are 96 and 192"),
        (recipe(9, 8, sharding="zero3", micro_batch=2), A100, "the nearest that can is 16"),
        (recipe(sharding="zero2"), A100, "sharding zero2 is not possible with hardware.gpus 1"),
        (recipe(sharding="ddp"), A100, "sharding ddp is not possible with hardware.gpus 1"),
        (recipe(gpus=2, sharding="none"), A100, "sharding none is not possible with hardware.gpus 2"),
        (recipe(attention="flash"), T4, "attention flash is not possible with hardware.gpu T4: its compute capability is 7.5"),
        (recipe(precision="bfloat16"), T4, "precision bfloat16 is not possible with hardware.gpu T4"),
        (recipe(attention="flash", precision="float32"), A100, "attention flash is not possible with precision float32"),
    ],
)
def test_what_cannot_be_names_both_numbers(wanted: Recipe, card: Card, says: str) -> None:
    (problem,) = refused(wanted, card).problems
    assert says in problem


def test_the_hint_names_the_micro_batches_that_work() -> None:
    assert "micro_batch may be 16, 8, 4, 2, 1;" in refused(recipe(128, 8, sharding="zero2", micro_batch=12)).hint


def test_all_that_cannot_be_is_said_at_once() -> None:
    wanted = recipe(8, attention="flash", precision="bfloat16", sharding="zero1", micro_batch=9)
    assert len(refused(wanted, T4).problems) == 4


def test_eager_attention_in_float32_works_on_every_card() -> None:
    assert solve(recipe(attention="eager-fp32"), T4)[0].attention == "eager-fp32"


def test_a_card_without_cuda_is_refused() -> None:
    with pytest.raises(UserError, match="MI300X is no CUDA card"):
        solve(recipe(), Card("MI300X", None))


def test_a_huge_batch_costs_nothing() -> None:
    choice, reasons = solve(recipe(10**12, 8, micro_batch=1))
    assert choice.accumulation == 125_000_000_000
    assert "125000000000" in reasons["accumulation"]


def test_the_ragged_rest_is_named() -> None:
    choice, reasons = solve(recipe(18, 4, micro_batch=2))
    assert micro_batch_sizes(choice) == ((2, 2, 1), (2, 2, 1), (2, 1, 1), (2, 1, 1))
    assert reasons["samples_per_gpu"] == "18 samples over 4 GPUs: 5 on 2 of them and 4 on the others"
    assert reasons["accumulation"] == "5 samples of a GPU, 2 at a time, make 3"
    assert reasons["last_micro_batch"] == "1 sample, ragged: the others have 2"


@pytest.mark.parametrize(
    ("counted", "images", "tokens_per_image", "expected"),
    [
        (False, 1, 576, 2623),
        (False, 2, 576, 3198),
        (False, 8, 576, 6648),
        (False, 1, 0, 2048),
        (True, 1, 576, 2048),
        (True, 0, 576, 2048),
    ],
)
def test_the_longest_sample(counted: bool, images: int, tokens_per_image: int, expected: int) -> None:
    data = Data(max_tokens=2048, image_tokens_count=counted, images_per_sample=images)
    assert sample_tokens(data, tokens_per_image) == expected


def test_the_published_stages_reach_their_lengths() -> None:
    published = load("moe-llava/phi2-clip336-as-published")
    assert [sample_tokens(data_of(published, stage), 576) for stage in published.stages] == [630, 2623, 2623]


@pytest.mark.parametrize(
    ("counted", "images", "says"), [(True, 4, "4 of 576 tokens each"), (False, 2049, "2049, one token each")]
)
def test_images_that_do_not_fit(counted: bool, images: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        sample_tokens(Data(max_tokens=2048, image_tokens_count=counted, images_per_sample=images), 576)
    assert "data.max_tokens 2048" in caught.value.problems[0]
