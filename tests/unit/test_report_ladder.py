"""The ways out on the screen: whole parts as they must look, and what holds for every ladder."""

from __future__ import annotations

import dataclasses
import itertools
import re
import types
import typing
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from oomph.records import (
    Card,
    Choice,
    FailingRequest,
    Fit,
    Limit,
    PhasePeak,
    Plan,
    Prediction,
    Rung,
    Search,
    Speed,
    StagePlan,
    Suggestion,
)
from oomph.report import words
from oomph.report.ladder import ROWS, alternatives, way_out
from oomph.report.text import render
from oomph.units import GIB, MIB

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")

ASKED = Choice(8, 2, 128, gpus=8, checkpointing="blocks", attention="eager", loss="full", sharding="zero2", master_weights=True)
PINNED = ("micro_batch", "checkpointing", "attention", "loss", "sharding")
ATTENTION = "eager becomes sdpa: PyTorch's fused kernels never write out the scores"
LOSS = "full becomes chunked: the logits of a sixteenth of the tokens exist at a time"
LARGER = "8 × 2 becomes 16 × 1, the same samples of a GPU in other pieces"
SMALLER = "8 × 2 becomes 4 × 4, the same samples of a GPU in other pieces"
ROUNDS = "the same gradient and update in exact arithmetic; in floating point, attention rounds elsewhere"
ORDER = "the same gradient and update in exact arithmetic; in floating point, sums run in another order"


def prediction(reserved: float, **roles: float) -> Prediction:
    by_role = {role: round(gib * GIB) for role, gib in roles.items()}
    peak = sum(by_role.values())
    return Prediction(True, peak, round(reserved * GIB), GIB, 40 * GIB, (), by_role, {}, None, (), 0.01, ())


FAILING = FailingRequest(
    bytes=6 * GIB,
    shape=(8, 32, 2048, 2048),
    dtype="float32",
    op="aten._softmax.default",
    module="model.layers.31.self_attn",
    phase="backward",
    role="scores",
    in_use_bytes=36 * GIB,
    reserved_bytes=37 * GIB,
)
TOO_MUCH = replace(
    prediction(50, weight=6, scores=20, activation=10),
    fits=False,
    allocated_peak_bytes=43 * GIB,
    failing_request=FAILING,
)


def speed(seconds: float, **parts: float) -> Speed:
    parts = {"compute": seconds - sum(parts.values()), **parts}
    return Speed(seconds, 128 / seconds, 128 * 2048 / seconds, 0.5 / seconds, None, parts)


def rung(
    seconds: float, needs: Prediction, changes: dict[str, str], *named: str, exactness: str = ROUNDS, **knobs: Any
) -> Rung:
    choice = replace(ASKED, **knobs)
    return Rung(
        **vars(speed(seconds, recompute=seconds / 4)),
        choice=choice,
        prediction=needs,
        changes=changes,
        exact=True,
        exactness=exactness,
        named=named,
    )


FASTEST = rung(
    2.0,
    prediction(36, weight=6, activation=20),
    {"micro_batch": LARGER, "attention": ATTENTION, "loss": LOSS},
    "fastest",
    micro_batch=16,
    accumulation=1,
    attention="sdpa",
    loss="chunked",
    expandable_segments=True,
)
BOTH = rung(
    2.5,
    prediction(16, weight=6, activation=9),
    {"attention": ATTENTION, "loss": LOSS},
    "least memory",
    attention="sdpa",
    loss="chunked",
)
LEAST = rung(2.52, prediction(33, weight=6, activation=10), {"attention": ATTENTION}, "least change", attention="sdpa")
PUBLISHED = rung(3.2, prediction(30, weight=6, scores=10), {"micro_batch": SMALLER}, micro_batch=4, accumulation=4)
STAGE = StagePlan(
    name="finetune",
    choice=ASKED,
    reasons=dict.fromkeys(PINNED, "pinned by memory"),
    prediction=TOO_MUCH,
    trainable_parameters=3 * 10**9,
    total_parameters=3 * 10**9,
    samples_tokens=2048,
    image_tokens=576,
    traced="by hand",
    speed=speed(3.0),
)
FAILS = replace(STAGE, ladder=(FASTEST, BOTH, LEAST, PUBLISHED), search=Search(12480, 9876, 1230, 212))
OWN = replace(PUBLISHED, changes={}, named=("fastest", "as asked"))
LEAN = replace(
    OWN,
    choice=replace(OWN.choice, optimizer_offload=True),
    prediction=prediction(12, weight=6, activation=3),
    step_seconds=4.0,
    samples_per_second=32.0,
    named=("least memory",),
    exactness=ORDER,
)
FITS = replace(STAGE, choice=OWN.choice, prediction=OWN.prediction, speed=speed(3.2), ladder=(OWN, LEAN), unpinned=FASTEST)
NEAREST = replace(FASTEST, prediction=TOO_MUCH, named=())
NOTHING = replace(STAGE, nearest=NEAREST)
SUGGESTED = (
    Suggestion("lora", "LoRA of rank 16 on every linear layer of the language model", 9 * GIB, 34 * GIB, True, "no gradients"),
    Suggestion("8-bit optimizer", "AdamW's states in 8 bits", 3 * GIB, 40 * GIB, False, "a byte for each state"),
)
FIT = Fit(
    (
        Card("H100-SXM5-80GB", replace(ASKED, gpus=1, accumulation=16, sharding="none", attention="sdpa"), 70 * GIB, 78 * GIB),
        Card("RTX-4090", replace(ASKED, gpus=16, accumulation=1), 20 * GIB, 23 * GIB),
    ),
    (
        Limit("micro_batch", 16, "samples", "all samples of a GPU at once"),
        Limit("max_tokens", 4864, "tokens", "64 more lack 0.31 GiB"),
        Limit("images_per_sample", 7, "images", ""),
    ),
)

SCREEN = """\

  ways out: what fits at effective batch 128, fastest first
  Nothing fits with all that the recipe sets, so these replace some of it.
  Speeds are estimates, for ranking; 1.00× is the fastest. Below each line
  stands what to add to the command for it.

    samples/s  speed    reserved         micro-batch × accumulation
         64.0  1.00×   36.00 GiB   90 %  16 × 1  fastest
      micro_batch=16 attention=sdpa loss=chunked expandable_segments=true
         51.2  0.80×   16.00 GiB   40 %   8 × 2  least memory
      attention=sdpa loss=chunked
         50.8  0.79×   33.00 GiB   82 %   8 × 2  least change
      attention=sdpa
         40.0  0.62×   30.00 GiB   75 %   4 × 4
      micro_batch=4
      searched: 12,480 configurations; 9,876 beaten by another one at any
        size, 1,230 ruled out by a bound, 212 replayed through the allocator

  fastest
    micro-batch 8 × 2 becomes 16 × 1, the same samples of a GPU in other
      pieces
    attention eager becomes sdpa: PyTorch's fused kernels never write out the
      scores
    loss full becomes chunked: the logits of a sixteenth of the tokens exist
      at a time
    left to the planner: expandable segments on
    fits: 36.00 GiB of 40.00 GiB reserved at the peak, 4.00 GiB to spare;
      attention scores fall from 20.00 GiB to none
    2.00 s a step, 33 % less than as asked, if that fitted; recompute 25 % of
      it
    exact: the same gradient and update in exact arithmetic; in floating
      point, attention rounds elsewhere

  least memory
    as above: attention, loss
    fits: 16.00 GiB of 40.00 GiB reserved at the peak, 24.00 GiB to spare;
      attention scores fall from 20.00 GiB to none
    2.50 s a step, 17 % less than as asked, if that fitted; recompute 25 % of
      it
    exact, as above

  least change
    as above: attention
    fits: 33.00 GiB of 40.00 GiB reserved at the peak, 7.00 GiB to spare;
      attention scores fall from 20.00 GiB to none
    2.52 s a step, 16 % less than as asked, if that fitted; recompute 25 % of
      it
    exact, as above
"""


def shown(stage: StagePlan, width: int = 80) -> str:
    return "".join(f"{line.plain}\n" for line in alternatives(stage, width))


def test_the_ladder_of_a_stage_that_does_not_fit() -> None:
    assert shown(FAILS) == SCREEN


def test_the_ways_out_stand_right_below_what_fails() -> None:
    screen = render(Plan("tiny", "T4", 8, (FAILS,), {}))
    positions = [screen.index(text) for text in ("asks for 6.00 GiB", "  ways out: ", "  batch    ", "  memory of one GPU")]
    assert positions == sorted(positions)


def test_the_ladder_of_a_stage_that_fits_stands_below_its_tables() -> None:
    screen = render(Plan("tiny", "T4", 8, (FITS,), {}))
    assert screen.index("  trace ") < screen.index("  what fits at effective batch 128, fastest first\n")
    assert (
        shown(FITS)
        == """\

  what fits at effective batch 128, fastest first
  All keep what the recipe sets. Speeds are estimates, for ranking; 1.00× is
  this plan. Below each line stands what to add to the command for it.

    samples/s  speed    reserved         micro-batch × accumulation
         40.0  1.00×   30.00 GiB   75 %  4 × 4  fastest, as asked, this plan
         32.0  0.80×   12.00 GiB   30 %  4 × 4  least memory
      optimizer_offload=true

  least memory
    left to the planner: optimizer offload on
    fits: 12.00 GiB of 40.00 GiB reserved at the peak, 28.00 GiB to spare;
      attention scores fall from 10.00 GiB to none
    4.00 s a step, 25 % more than in this plan; recompute 20 % of it
    exact: the same gradient and update in exact arithmetic; in floating
      point, sums run in another order

  faster, if settings of the recipe were replaced
    micro_batch=16 attention=sdpa loss=chunked expandable_segments=true
    micro-batch 8 × 2 becomes 16 × 1, the same samples of a GPU in other
      pieces
    attention eager becomes sdpa: PyTorch's fused kernels never write out the
      scores
    loss full becomes chunked: the logits of a sixteenth of the tokens exist
      at a time
    left to the planner: expandable segments on
    fits: 36.00 GiB of 40.00 GiB reserved at the peak, 4.00 GiB to spare;
      attention scores fall from 10.00 GiB to none
    2.00 s a step, 38 % less than in this plan; recompute 25 % of it
    exact: the same gradient and update in exact arithmetic; in floating
      point, attention rounds elsewhere
"""
    )


def test_where_nothing_fits_the_nearest_is_told() -> None:
    assert (
        shown(NOTHING)
        == """\

  no configuration fits at effective batch 128; the nearest lacks 3.00 GiB at
  least
    micro_batch=16 attention=sdpa loss=chunked expandable_segments=true
    The backward pass of recomputed block 31 asks for 6.00 GiB:
    fp32 [8, 32, 2048, 2048], attention scores made by softmax in
    model.layers.31.self_attn. At that moment 36.00 GiB is in use and 37.00 GiB
    reserved, of 40.00 GiB usable.
"""
    )
    own = replace(NOTHING, nearest=replace(NEAREST, choice=ASKED))
    assert shown(own).endswith("at\n  least\n    the plan's own settings\n")
    pieces = replace(TOO_MUCH, allocated_peak_bytes=30 * GIB)
    assert "the nearest has enough memory,\n  but in pieces" in shown(
        replace(NOTHING, nearest=replace(NEAREST, prediction=pieces))
    )


def test_other_mathematics_are_only_suggested() -> None:
    assert (
        shown(replace(STAGE, suggestions=SUGGESTED))
        == """\

  other mathematics, only suggested
         saves   allocated  fits
      9.00 GiB   34.00 GiB  yes   LoRA of rank 16 on every linear layer of the
                                  language model (no gradients)
      3.00 GiB   40.00 GiB  no    AdamW's states in 8 bits (a byte for each
                                  state)
"""
    )


def test_what_it_would_take() -> None:
    assert (
        shown(replace(STAGE, fit=FIT))
        == """\

  what it would take: the smallest card for each number of GPUs
                            reserved         micro-batch × accumulation
     1 ×  H100-SXM5-80GB   70.00 GiB   90 %  8 × 16
      attention=sdpa sharding=none
    16 ×  RTX-4090         20.00 GiB   87 %   8 × 1
      the plan's own settings

  at most       micro-batch 16 samples: all samples of a GPU at once
                max tokens 4,864: 64 more lack 0.31 GiB
                images per sample 7
"""
    )
    assert "no card of the catalogue has room" in shown(replace(STAGE, fit=Fit((), ())))


def test_without_a_search_there_is_nothing_to_say() -> None:
    assert shown(STAGE) == ""
    assert way_out(STAGE) == ""


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        (
            FAILS,
            "finetune fits with attention=sdpa; the fastest that fits is "
            "micro_batch=16 attention=sdpa loss=chunked expandable_segments=true",
        ),
        (replace(FAILS, ladder=(LEAST,)), "finetune fits with attention=sdpa"),
        (NOTHING, "finetune: no configuration fits; the nearest lacks 3.00 GiB at least"),
        (
            FITS,
            "finetune would take 38 % less time with micro_batch=16 attention=sdpa loss=chunked expandable_segments=true",
        ),
        (replace(FITS, unpinned=None), ""),
        (
            replace(FITS, unpinned=None, ladder=(replace(LEAN, step_seconds=1.6),)),
            "finetune would take 50 % less time with optimizer_offload=true",
        ),
    ],
)
def test_the_way_out_is_the_last_line(stage: StagePlan, sentence: str) -> None:
    assert way_out(stage).replace("\xa0", " ") == sentence
    last = render(Plan("tiny", "T4", 8, (stage,), {})).rpartition("\n\n")[2]
    assert " ".join(last.split()) == sentence or not sentence


def test_what_does_not_fit_has_a_speed_if_it_fitted() -> None:
    screen = render(Plan("tiny", "T4", 8, (replace(FAILS, speed=replace(speed(3.0, recompute=1), gpu_hours=12345.6)),), {}))
    assert (
        """
  speed         if it fitted, 3.00 s a step: 42.7 samples/s, 87,381 tokens/s,
                  MFU 17 %, 12,346 GPU hours for the stage; an estimate, for
                  ranking
                of a step: compute 67 %, recompute 33 %
"""
        in screen
    )
    assert "speed         3.20 s a step: 40.0 samples/s" in render(Plan("tiny", "T4", 8, (FITS,), {}))


def test_a_ragged_cut_and_a_change_of_mathematics_are_called_so() -> None:
    ragged = replace(LEAST, choice=replace(LEAST.choice, micro_batch=7, accumulation=3), exact=False, exactness="another one")
    text = shown(replace(FAILS, ladder=(ragged,)))
    assert "7 × 3  least change, ragged\n" in text
    assert "    not exact: another one\n" in text


def many(count: int, changed: int = 0) -> StagePlan:
    """A ladder with as many rungs, of which the last `changed` replace two settings and the others three."""
    rungs = [replace(BOTH, step_seconds=1 + at / 100, samples_per_second=float(1000 + at), named=()) for at in range(count)]
    ladder = [replace(one, changes=dict.fromkeys("abc"[at >= count - changed :], "x")) for at, one in enumerate(rungs)]
    return replace(FAILS, ladder=(replace(ladder[0], named=("fastest",)), *ladder[1:]))


def rows(text: str) -> list[int]:
    """The numbers of the rungs in the table, which `many` has written into their speeds."""
    return [int(number.replace(",", "")) - 1000 for number in re.findall(r"^ +(1,\d{3})  \d\.\d\d×", text, re.MULTILINE)]


@given(st.integers(1, 60), st.integers(0, 5), st.sets(st.integers(0, 59), max_size=12))
@settings(max_examples=40)
def test_the_table_has_what_matters_of_the_ladder(count: int, changed: int, names: set[int]) -> None:
    stage = many(count, min(changed, count))
    named = {0, *(at for at in names if at < count)}
    ladder = tuple(replace(one, named=("one",) if at in named else ()) for at, one in enumerate(stage.ladder))
    text = shown(replace(stage, ladder=ladder))
    found = rows(text)
    assert found == sorted(set(found))
    assert named <= set(found)
    simple = range(count - min(changed, count), count)
    assert len(set(simple) & set(found)) >= min(3, len(simple))
    assert len(found) >= min(count, ROWS)
    assert len(found) <= max(ROWS, len(named) + 3)
    assert (f"{count - len(found)} more in --json" in text) == (len(found) < count)


def test_those_that_replace_least_are_rows() -> None:
    assert rows(shown(many(50, changed=3)))[-3:] == [47, 48, 49]
    assert len(rows(shown(many(50, changed=20)))) == ROWS


def test_rows_come_from_all_over_the_ladder() -> None:
    found = rows(shown(many(60)))
    assert max(after - before for before, after in itertools.pairwise([*found, 60])) <= 15


# Properties over any plan.

sizes = st.integers(0, 10**15)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, within what a screen can be asked to show."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return records(hint)
    if origin is tuple:
        return st.lists(values(args[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=2)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, args))
    if origin is Literal:
        return st.sampled_from(args)
    plain = {int: sizes, float: st.floats(0, 1e15), str: st.text(max_size=40), bool: st.booleans(), type(None): st.none()}
    return plain[hint]


def records(kind: type[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{f.name: values(hints[f.name]) for f in dataclasses.fields(kind)})


@settings(max_examples=40)
@given(records(StagePlan), st.integers(70, 130))
def test_no_line_is_longer_than_the_terminal_and_no_name_steers_it(stage: StagePlan, width: int) -> None:
    plan = Plan("tiny", "T4", 8, (stage,), {})
    for line in render(plan, width).split("\n"):
        assert cell_len(line) <= width
        assert line.isprintable()
    colored = ESCAPE.sub("", render(plan, width, color=True))
    assert "\n".join(line.rstrip() for line in colored.split("\n")) == render(plan, width)


@given(records(Choice), records(Choice))
def test_settings_are_all_that_differs(choice: Choice, asked: Choice) -> None:
    given_ = dict(setting.split("=") for setting in words.settings(choice, asked))
    for field in dataclasses.fields(Choice):
        new, old = getattr(choice, field.name), getattr(asked, field.name)
        if field.name in ("accumulation", "effective_batch", "gpus", "nodes"):
            assert field.name not in given_
        else:
            assert given_.get(field.name, str(old).lower()) == str(new).lower()


def test_an_evaluation_batch_that_follows_is_no_setting() -> None:
    own, other = replace(ASKED, eval_batch=8), replace(ASKED, micro_batch=4, accumulation=4, eval_batch=4)
    assert words.settings(other, own) == ["micro_batch=4"]
    assert words.settings(other, replace(own, eval_batch=2)) == ["micro_batch=4", "eval_batch=4"]


@given(st.floats(1e-3, 1e12))
def test_a_number_has_three_digits(value: float) -> None:
    assert float(words.number(value).replace(",", "")) == pytest.approx(value, rel=0.006, abs=0.0006)
    assert len(words.number(value)) <= 9


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0834, "0.083"),
        (0.9999, "1.00"),
        (2.456, "2.46"),
        (9.996, "10.0"),
        (52.14, "52.1"),
        (136600.4, "136,600"),
        (1e9, "1.00e+09"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert words.number(value) == text


def test_times_and_ratios() -> None:
    assert [words.seconds(value).replace("\xa0", " ") for value in (0.084, 0.99951, 61.2)] == ["84.0 ms", "1.00 s", "61.2 s"]
    assert [words.times(value) for value in (0.5, 1.294, 12.34)] == ["0.50×", "1.29×", "12.3×"]


def test_an_evaluation_counts_in_the_table() -> None:
    needs = replace(LEAST.prediction, evaluation=PhasePeak("evaluate", 5 * GIB, 38 * GIB + MIB))
    assert "38.00 GiB   95 %" in shown(replace(FAILS, ladder=(replace(LEAST, prediction=needs),)))
