"""Records and JSON: there and back without loss, and nothing read that was not written."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomph import records
from oomph.record import Document
from oomph.records import (
    Card,
    Choice,
    FailingRequest,
    Fit,
    Footprint,
    Limit,
    MeasuredRung,
    MeasuredStage,
    Measurement,
    PhasePeak,
    Plan,
    Prediction,
    Record,
    Recovery,
    Request,
    RoleBytes,
    Rung,
    Search,
    Speed,
    StagePlan,
    Suggestion,
    Timeline,
    TimelinePart,
)

PEAK = PhasePeak("backward", 3, 4)
REQUEST: dict[str, Any] = dict(bytes=4, shape=(1,), dtype="float32", op="mm", module="head", phase="forward", role="logits")
PREDICTION = Prediction(True, 3, 4, 1, 9, (PEAK,), {"weight": 3}, {"head": 3}, None, (Request(**REQUEST),), 0.01, ())
STAGE = StagePlan("align", Choice(8, 2, 128, gpus=8), {"loss": "default"}, PREDICTION, 1, 2, 2623, 576, "phi-2")
SPEED: dict[str, Any] = {
    "step_seconds": 1.5,
    "samples_per_second": 4.0,
    "tokens_per_second": 80.0,
    "flop_utilisation": 0.5,
    "gpu_hours": None,
    "seconds": {"compute": 1.5},
}
MEASURED = MeasuredRung(STAGE.choice, Footprint(3, 4, (PEAK,)), 1, Footprint(3, 4, (PEAK,)), step_seconds=0.5)
CLIMB = MeasuredStage("align", 64, 1, (MEASURED,), "micro-batch 8: the recipe's micro-batch")
EXAMPLES: dict[type[Any], Any] = {
    Choice: STAGE.choice,
    Request: Request(**REQUEST),
    FailingRequest: FailingRequest(**REQUEST, in_use_bytes=1, reserved_bytes=2),
    PhasePeak: PEAK,
    Footprint: Footprint(3, 4, (PEAK,)),
    Prediction: PREDICTION,
    StagePlan: STAGE,
    Speed: Speed(**SPEED),
    Rung: Rung(**SPEED, choice=STAGE.choice, prediction=PREDICTION, changes={"loss": "why"}, exact=True, exactness="the same"),
    Suggestion: Suggestion("lora", "adapters alone", 1, 2, True, "arithmetic"),
    Limit: Limit("micro_batch", 8, "samples", "9 do not fit"),
    Card: Card("T4", STAGE.choice, 1, 2),
    Fit: Fit((Card("T4", STAGE.choice, 1, 2),), (Limit("micro_batch", 8, "samples", ""),)),
    Search: Search(4, 1, 1, 1),
    TimelinePart: TimelinePart("first step", "forward", 2),
    RoleBytes: RoleBytes("weight", (1, 2)),
    Timeline: Timeline((0, 4), 5, (1, 2), (RoleBytes("weight", (1, 2)),), (TimelinePart("load", "load", 0),), 1),
    Plan: Plan("recipe.yaml", "A100-40GB", 8, (STAGE,), {"torch": "2.13.0"}),
    MeasuredRung: MEASURED,
    MeasuredStage: CLIMB,
    Measurement: Measurement("tiny", "cuda", "T4", "580.1", "13.0", (CLIMB,), (), {"torch": "2.13.0"}, "2026-01-02"),
    Recovery: Recovery(
        **{"step": 7, "micro_batch": 0, "kind": "allocator", "phase": "backward", "module": "head", "message": "out of memory"},
        **{"predicted_bytes": 3, "limit_bytes": 4, "measured_bytes": 4, "from_choice": STAGE.choice, "to_choice": STAGE.choice},
        **{"from_split": ((0, 1),), "to_split": ((0,), (1,))},
    ),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of one field's type: every field is drawn, those with a default too."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return instances(hint)
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return st.lists(values(args[0]), max_size=2).map(tuple)
    if typing.get_origin(hint) is dict:
        return st.dictionaries(st.text(max_size=8), values(args[1]), max_size=2)
    if type(None) in args:
        return st.one_of(st.none(), *(values(arg) for arg in args if arg is not type(None)))
    return st.from_type(hint)


def instances(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Records of one type, with values of the annotated types."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: values(hints[field.name]) for field in dataclasses.fields(kind)}
    if kind in (Plan, Measurement):
        fields["schema"] = st.just(records.SCHEMA)
    return st.builds(kind, **fields)


def test_every_record_is_tested_here() -> None:
    defined = {kind for kind in vars(records).values() if isinstance(kind, type) and issubclass(kind, Record)}
    assert defined - {Record, Document} == set(EXAMPLES)


@pytest.mark.parametrize("kind", EXAMPLES)
@given(data=st.data())
@settings(max_examples=30)
def test_json_round_trip(kind: type[Record], data: st.DataObject) -> None:
    record = data.draw(instances(kind))
    assert kind.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=lambda example: type(example).__name__)
def test_records_are_frozen(example: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(example, dataclasses.fields(example)[0].name, None)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_unknown_keys_are_errors(kind: type[Record]) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: {kind.__name__} has no field extra, more"):
        kind.from_json(EXAMPLES[kind].to_json() | {"more": 1, "extra": 2})


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_field_without_a_default_is_required(kind: type[Any]) -> None:
    for field in dataclasses.fields(kind):
        data = EXAMPLES[kind].to_json()
        del data[field.name]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            with pytest.raises(ValueError, match=f"{kind.__name__} lacks {field.name}"):
                kind.from_json(data)
        else:
            kind.from_json(data)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_value_of_another_type_is_an_error(kind: type[Record]) -> None:
    example = EXAMPLES[kind].to_json()
    for name in example:
        with pytest.raises(ValueError, match=rf"^{kind.__name__}\.{name}: "):
            kind.from_json(example | {name: object()})


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_a_record_is_read_from_an_object_only(data: Any) -> None:
    with pytest.raises(ValueError, match="Plan is read from an object, not from"):
        Plan.from_json(data)


@pytest.mark.parametrize("value", [True, 8.0, "8", None, [8]])
def test_only_integers_pass_for_integers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Choice\.micro_batch: .* is not of type int"):
        Choice.from_json(EXAMPLES[Choice].to_json() | {"micro_batch": value})


def test_a_whole_number_passes_for_a_float_and_a_truth_value_does_not() -> None:
    example = EXAMPLES[Prediction].to_json()
    assert isinstance(Prediction.from_json(example | {"error_bound": 1}).error_bound, float)
    with pytest.raises(ValueError, match="True is not of type float"):
        Prediction.from_json(example | {"error_bound": True})


def test_only_the_named_values_pass_for_a_knob() -> None:
    with pytest.raises(ValueError, match=r"^Choice\.sharding: 'zero9' is none of 'none', 'ddp', 'zero1', 'zero2', 'zero3'"):
        Choice.from_json(EXAMPLES[Choice].to_json() | {"sharding": "zero9"})


def test_the_message_names_the_place() -> None:
    data = EXAMPLES[Plan].to_json()
    data["stages"][0]["prediction"]["by_role"]["weight"] = "much"
    with pytest.raises(ValueError, match=r"^Plan\.stages\[0\]\.prediction\.by_role\['weight'\]: 'much' is not of type int$"):
        Plan.from_json(data)


def test_a_plan_of_another_schema_is_not_read() -> None:
    with pytest.raises(ValueError, match="comes from another version"):
        Plan.from_json(EXAMPLES[Plan].to_json() | {"schema": records.SCHEMA + 1, "a_key_of_the_future": 1})


def test_a_plan_fits_when_every_stage_does() -> None:
    plan, crashing = EXAMPLES[Plan], dataclasses.replace(STAGE, prediction=dataclasses.replace(PREDICTION, fits=False))
    assert plan.fits
    assert not dataclasses.replace(plan, stages=(STAGE, crashing)).fits
