from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from oomph import cli
from oomph.core.choices import (
    cuts,
    micro_batch_candidates,
    micro_batch_sizes,
    reasons_for,
    resolve,
    sample_tokens,
    with_micro_batch,
)
from oomph.errors import UserError
from oomph.recipe import KNOBS, Data, Recipe, data_of, load, override, stage_of
from oomph.records import Choice, Precision


@dataclass(frozen=True)
class Card:
    name: str
    compute_capability: tuple[int, int] | None


A100 = Card("A100-SXM4-40GB", (8, 0))
T4 = Card("T4", (7, 5))
PINS: dict[str, list[Any]] = {
    "sharding": ["auto", "none", "ddp", "zero1", "zero3", "fsdp2", "fsdp2-hybrid"],
    "attention": ["auto", "sdpa", "flash", "efficient"],
    "precision": ["auto", *get_args(Precision)],
    "master_weights": ["auto", True, False],
    "optimizer_offload": ["auto", True, False],
    "checkpointing": ["auto", "none", "every-4"],
    "optimizer": ["auto", "adamw-foreach", "adamw-8bit", "adamw-8bit-paged"],
}


def recipe(effective_batch: int = 16, gpus: int = 1, nodes: int = 1, **memory: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "model": "phi-2",
            "data": {"max_tokens": 512},
            "hardware": {"gpu": "A100-SXM4-40GB", "gpus": gpus, "nodes": nodes},
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
        vision_checkpointing="blocks",
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
        "optimizer_offload": True,
        "master_weights": False,
        "sharding": "fsdp2-hybrid",
        "vision_checkpointing": "blocks",
        "expandable_segments": True,
        "eval_batch": 3,
    }
    choice, reasons = solve(recipe(gpus=4, nodes=2, **pinned))
    assert set(pinned) == set(KNOBS)
    assert {name: getattr(choice, name) for name in pinned} == pinned
    assert {reasons[name] for name in pinned} == {f"pinned by memory.{name}" for name in pinned}
    assert (choice.accumulation, choice.nodes) == (2, 2)


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
        vision_checkpointing="blocks",
        attention="eager-fp32",
        loss="full-shifted",
        precision="bfloat16",
        optimizer="adamw-foreach",
        master_weights=True,
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
        choice, reasons = resolve(stage, ours, A100)
        assert (choice.master_weights, choice.sharding) == (True, "ddp")
        assert reasons["master_weights"] == "pinned by memory.master_weights"


# Knobs that follow from others.


@pytest.mark.parametrize("sharding", ["zero1", "zero2", "zero3"])
def test_zero_has_master_weights_where_weights_are_half_precision(sharding: str) -> None:
    choice, reasons = solve(recipe(gpus=2, sharding=sharding))
    assert choice.master_weights
    assert reasons["master_weights"] == f"sharding {sharding} always has them"
    assert not solve(recipe(gpus=2, sharding=sharding, precision="float32"))[0].master_weights


def test_master_weights_are_had_with_every_sharding() -> None:
    for gpus, shardings in ((1, ["none"]), (2, ["ddp", "zero2", "fsdp2", "fsdp2-no-reshard"])):
        for sharding in shardings:
            assert solve(recipe(gpus=gpus, master_weights=True, sharding=sharding))[0].master_weights
    assert not solve(recipe(gpus=2))[0].master_weights


@pytest.mark.parametrize(
    ("memory", "vision"),
    [
        ({}, "blocks"),
        ({"checkpointing": "every-3"}, "blocks"),
        ({"checkpointing": "none"}, "none"),
        ({"checkpointing": "none", "vision_checkpointing": "blocks"}, "blocks"),
        ({"vision_checkpointing": "none"}, "none"),
    ],
)
def test_the_tower_is_checkpointed_as_the_language_model_is(memory: dict[str, str], vision: str) -> None:
    assert solve(recipe(**memory))[0].vision_checkpointing == vision


def test_what_a_search_found_has_its_own_reasons() -> None:
    """Knobs left open that got another value, and the micro-batch, whose number the search decided in any case."""
    wanted = recipe(attention="eager", sharding="fsdp2", gpus=2)
    choice, reasons = solve(wanted)
    found = replace(with_micro_batch(choice, 2, "auto"), checkpointing="every-2", loss="full")
    again = reasons_for(found, wanted.stages[0], wanted, A100)
    assert set(again) == set(reasons)
    searched = {knob for knob, reason in again.items() if reason == "the fastest configuration that fits has it"}
    assert searched == {"micro_batch", "checkpointing", "loss"}
    assert again["accumulation"] == "8 samples of a GPU, 2 at a time, make 4"
    assert again["attention"] == "pinned by memory.attention"


# Cuts of a batch.


@given(st.integers(1, 60), st.integers(1, 8), st.booleans())
def test_the_cuts_are_the_micro_batches_that_a_recipe_may_pin(batch: int, gpus: int, zero: bool) -> None:
    assume(batch >= gpus and (gpus > 1 or not zero))
    sharding = "zero2" if zero else "ddp" if gpus > 1 else "none"
    choice = Choice(1, batch, batch, gpus)
    possible = []
    for micro_batch in range(1, batch + 1):
        try:
            solve(recipe(batch, gpus, sharding=sharding, micro_batch=micro_batch))
        except UserError:
            continue
        possible.append(micro_batch)
    every = list(cuts(choice, sharding, every=True))
    assert every == sorted(possible, reverse=True)
    best = list(cuts(choice, sharding))
    steps = {micro_batch: with_micro_batch(choice, micro_batch, "none").accumulation for micro_batch in every}
    assert best == [cut for cut in every if cut == min(other for other in every if steps[other] == steps[cut])]


@given(st.integers(1, 60), st.integers(1, 8), st.sampled_from(["auto", "none", 3]))
def test_another_cut_keeps_the_samples(batch: int, gpus: int, eval_batch: int | str) -> None:
    assume(batch >= gpus)
    choice, _ = solve(recipe(batch, gpus, eval_batch=eval_batch))
    for micro_batch in cuts(choice, choice.sharding):
        other = with_micro_batch(choice, micro_batch, eval_batch)
        assert other == solve(recipe(batch, gpus, eval_batch=eval_batch, micro_batch=micro_batch))[0]
        assert sum(map(sum, micro_batch_sizes(other))) == batch


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
        (recipe(precision="bfloat16-mixed"), T4, "precision bfloat16-mixed is not possible with hardware.gpu T4"),
        (recipe(attention="flash", precision="float32"), A100, "attention flash is not possible with precision float32"),
        (recipe(precision="bfloat16-mixed", master_weights=True), A100, "master_weights true is not possible with precision"),
        (recipe(gpus=2, precision="float16-mixed", sharding="zero2", master_weights=False), A100, "DeepSpeed has a mixed"),
        (recipe(gpus=2, precision="bfloat16-mixed", sharding="fsdp2"), A100, "FSDP2 has a mixed precision of its own"),
        (recipe(gpus=2, precision="float16", sharding="zero3"), A100, "DeepSpeed scales the loss of float16 models"),
        (recipe(sharding="zero3"), A100, "sharding zero3 is not possible with hardware.gpus 1"),
        (recipe(sharding="fsdp2"), A100, "sharding fsdp2 is not possible with hardware.gpus 1"),
        (recipe(gpus=8, sharding="fsdp2-hybrid"), A100, "sharding fsdp2-hybrid is not possible with hardware.nodes 1"),
        (recipe(gpus=8, nodes=8, sharding="fsdp2-hybrid"), A100, "is not possible with hardware.nodes 8 for 8 GPUs"),
        (recipe(gpus=2, sharding="zero1", master_weights=False), A100, "master_weights false is not possible with sharding ze"),
        (recipe(gpus=2, sharding="zero3", optimizer_offload=True), A100, "optimizer_offload true is not possible with shard"),
        (recipe(gpus=2, sharding="zero2", optimizer="adamw-8bit"), A100, "adamw-8bit is not possible with sharding zero2"),
        (recipe(gpus=2, sharding="fsdp2", optimizer="adamw-8bit-paged"), A100, "bitsandbytes updates whole tensors"),
        (recipe(optimizer_offload=True, optimizer="adamw-8bit"), A100, "optimizer_offload true is not possible with opt"),
        (recipe(master_weights=True, optimizer="adamw-8bit"), A100, "master_weights true is not possible with optim"),
    ],
)
def test_what_cannot_be_names_both_settings(wanted: Recipe, card: Card, says: str) -> None:
    (problem,) = refused(wanted, card).problems
    assert says in problem


@given(st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)]), st.data())
def test_pins_clash_or_make_a_choice_that_has_them(cluster: tuple[int, int], data: st.DataObject) -> None:
    """Any pins: a choice with just these, or a sentence for each clash, which names a value of the recipe's."""
    pins = {knob: data.draw(st.sampled_from(values), knob) for knob, values in PINS.items()}
    wanted = recipe(16, *cluster, **pins)
    card = data.draw(st.sampled_from([A100, T4]))
    given = {knob: value for knob, value in pins.items() if value != "auto"}
    problems: list[str] = []
    try:
        choice, _ = solve(wanted, card)
    except UserError as error:
        problems = error.problems
    else:
        assert {knob: getattr(choice, knob) for knob in given} == given
    assert len(set(problems)) == len(problems)
    for problem in problems:
        assert any(f"{knob} {str(value).lower()} " in problem for knob, value in given.items()), problem


@pytest.mark.parametrize(("gpus", "sharding"), [(1, "none"), (2, "ddp")])
@pytest.mark.parametrize("optimizer", ["adamw-8bit", "adamw-8bit-paged"])
def test_whole_parameters_have_states_of_eight_bits(gpus: int, sharding: str, optimizer: str) -> None:
    choice, reasons = solve(recipe(gpus=gpus, optimizer=optimizer))
    assert (choice.optimizer, choice.sharding, choice.master_weights) == (optimizer, sharding, False)
    assert reasons["optimizer"] == "pinned by memory.optimizer"


def test_the_hint_names_the_micro_batches_that_work() -> None:
    assert "micro_batch may be 16, 8, 4, 2, 1;" in refused(recipe(128, 8, sharding="zero2", micro_batch=12)).hint


def test_all_that_cannot_be_is_said_at_once() -> None:
    wanted = recipe(8, attention="flash", precision="bfloat16", sharding="zero1", micro_batch=9)
    assert len(refused(wanted, T4).problems) == 4
    pins = {"sharding": "zero2", "optimizer_offload": True, "master_weights": False, "attention": "flash"}
    assert len(refused(recipe(8, **pins, precision="bfloat16"), T4).problems) == 5


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["micro_batch=16", "stages.tune.effective_batch=8"], ["micro_batch 16", "effective_batch 8"]),
        (["attention=flash", "hardware.gpu=T4"], ["attention flash", "hardware.gpu T4"]),
        (["sharding=zero3"], ["sharding zero3", "hardware.gpus 1"]),
    ],
)
def test_impossible_pins_are_wrong_input(tmp_path: Path, capsys: Any, settings: list[str], names: list[str]) -> None:
    """Exit code 2, before anything is traced: there is no model in the folder but for a configuration."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "recipe.yaml"
    lines = [
        "name: small",
        f"model: {json.dumps(str(tmp_path))}",
        "data: {max_tokens: 512}",
        "hardware: {gpu: A100-SXM4-40GB}",
        "stages: [{name: tune, train: {language: 1.0e-4}, effective_batch: 16}]",
    ]
    file.write_text("\n".join(lines))
    assert cli.run(["plan", str(file), *settings]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert all(name in err for name in names)
    assert "hint: " in err


@pytest.mark.parametrize("precision", ["float16", "float16-mixed"])
def test_float16_works_on_every_card(precision: str) -> None:
    for card in (A100, T4):
        choice, reasons = solve(recipe(precision=precision), card)
        assert (choice.precision, choice.master_weights) == (precision, False)
        assert reasons["precision"] == "pinned by memory.precision"
    assert solve(recipe(gpus=2, precision=precision))[0].sharding == "ddp"
    assert solve(recipe(precision=precision, attention="flash"))[0].attention == "flash"


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
