"""The roofline by hand: which of the three limits an operator, what collectives take, what hides behind what."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph.core.choices import micro_batch_sizes
from oomph.core.closed_form import FEATURES, ClosedForm
from oomph.core.devices import Gpu, catalogue, find_gpu
from oomph.core.dimensions import Dimension
from oomph.core.layout import Shape
from oomph.core.speed import (
    ADAMW_PASSES,
    CLIPPING_PASSES,
    HOST_BANDWIDTH,
    LAUNCH_SECONDS,
    cost,
    estimate,
    host_rate,
    link_rate,
    ring_all_gather,
    ring_all_reduce,
)
from oomph.core.trace import Parameter
from oomph.core.work import Row, Work
from oomph.records import Choice, Speed

A100 = find_gpu("A100-SXM4-40GB")
TOKENS, HIDDEN, VOCABULARY = 1000, 1024, 32_000
NETWORK = 25e9

BLOCK = [Parameter(f"model.layers.{n}.fc.weight", (4 * HIDDEN, HIDDEN), "bfloat16", True, "language") for n in range(2)]
PARAMETERS = [
    Parameter("vision.encoder.layers.0.fc.weight", (HIDDEN, HIDDEN), "bfloat16", False, "vision"),
    Parameter("model.embed_tokens.weight", (VOCABULARY, HIDDEN), "bfloat16", True, "language"),
    *BLOCK,
]
EMBEDDING, TRAINED_LAYERS = 2 * HIDDEN * VOCABULARY, 2 * HIDDEN * 8 * HIDDEN
TRAINED, LAYERS = EMBEDDING + TRAINED_LAYERS, TRAINED_LAYERS + 2 * HIDDEN * HIDDEN

# Of one sample: the seconds of a forward on an A100 by its floating-point operations, and those of its backward.
FORWARD, RECOMPUTE, BACKWARD = 0.10, 0.08, 0.20
OPTIMIZER_BYTES = 10 * TRAINED


def row(work: Work, piece: str, phase: str, flops: int = 0, traffic: int = 0, **more: Any) -> None:
    """Adds an operator: floating-point operations of each sample, bytes of each sample."""
    sums = []
    for amount in (flops, traffic):
        work.products.append((Dimension(FEATURES.index("samples"), amount, 0),))
        sums.append((len(work.products) - 1,) if amount else ())
    made = Row(piece, phase, "aten.mm.default", "bfloat16", 1, 1, *sums)
    work.rows.append(made._replace(**more))


def made_form(*, accumulates: float = 0.01) -> ClosedForm:
    """A form whose micro-batches take the seconds above for each sample, a later one a little more in its backward."""
    work = Work()
    for piece, more in (("first", 0.0), ("next", accumulates)):
        for phase, seconds in (("forward", FORWARD), ("recompute", RECOMPUTE), ("backward", BACKWARD + more)):
            row(work, piece, phase, round(seconds * A100.peak_flops["bfloat16"]))
    work.products.append((Dimension(0, OPTIMIZER_BYTES, 0),))
    work.rows.append(Row("step/optimizer", "optimizer", "adamw", "bfloat16", 1, 1, (), (len(work.products) - 1,)))
    return ClosedForm(work=work, parameters=list(PARAMETERS))


FORM = made_form()


def speed_of(choice: Choice, form: ClosedForm = FORM, gpu: Gpu = A100, samples: float | None = None, **more: Any) -> Speed:
    return estimate(
        form, choice, gpu, TOKENS, 1, network_bytes_per_second=NETWORK, samples_in_stage=samples, costs=more.get("costs")
    )


def choice_of(**knobs: Any) -> Choice:
    return Choice(**{"micro_batch": 4, "accumulation": 2, "effective_batch": 64, "gpus": 8, "sharding": "ddp", **knobs})


# The roofline.


@pytest.mark.parametrize(
    ("flops", "traffic", "launches", "seconds"),
    [
        (10**12, 10**6, 1, 10**12 / 312e12),
        (10**6, 10**10, 1, 10**10 / 1555e9),
        (10**6, 10**6, 1, LAUNCH_SECONDS),
        (10**6, 10**6, 8, 8 * LAUNCH_SECONDS),
        (0, 155_500, 0, 1e-7),
    ],
)
def test_the_slowest_of_three_sets_the_time(flops: int, traffic: int, launches: int, seconds: float) -> None:
    work = Work()
    row(work, "next", "forward", flops, traffic, launches=launches, times=3)
    found = cost(ClosedForm(work=work), Shape(1, TOKENS, 1), A100)
    assert found.next.forward == pytest.approx(3 * seconds)
    assert found.next.recompute == found.next.backward == found.first.forward == found.optimizer == 0


def test_each_dtype_has_its_own_peak() -> None:
    """Without TF32, which torch does not use unless it is asked to, float32 has no tensor cores."""
    work = Work()
    for dtype, phase in (("float32", "forward"), ("bfloat16", "recompute"), ("int64", "backward")):
        row(work, "next", phase, 10**12, dtype=dtype)
    found = cost(ClosedForm(work=work), Shape(1, TOKENS, 1), A100).next
    assert found.forward == found.backward == pytest.approx(10**12 / 19.5e12)
    assert found.recompute == pytest.approx(10**12 / 312e12)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_is_used_to_the_peak_of_its_products(precision: Any) -> None:
    plain, mixed = (speed_of(Choice(4, 3, 12, precision=name)) for name in (precision, f"{precision}-mixed"))
    assert mixed.flop_utilisation == plain.flop_utilisation
    assert mixed.flop_utilisation != speed_of(Choice(4, 3, 12, precision="float32")).flop_utilisation


def test_the_model_computes_nothing_twice() -> None:
    """Recomputed blocks do not count, nor do the scores that a fused attention makes again in its backward."""
    work = Work()
    row(work, "next", "forward", 100)
    row(work, "next", "recompute", 100)
    row(work, "next", "backward", 200)
    row(work, "next", "backward", 500, name="aten._scaled_dot_product_flash_attention_backward.default", times=2)
    row(work, "first", "forward", 7)
    assert cost(ClosedForm(work=work), Shape(3, TOKENS, 3), A100).flops == pytest.approx(3 * (100 + 200 + 2 * 400))


def test_the_optimizer_s_traffic_is_a_share_of_the_traced_one() -> None:
    for share in (1.0, 0.25):
        found = cost(FORM, Shape(4, TOKENS, 4), A100, share)
        assert found.optimizer == pytest.approx(share * OPTIMIZER_BYTES / A100.bandwidth)


# Rings and links.


def test_a_ring_moves_each_byte_over_all_links_but_one() -> None:
    assert ring_all_gather(8e9, 8, 1e9) == pytest.approx(7)
    assert ring_all_reduce(8e9, 8, 1e9) == pytest.approx(14)
    assert ring_all_gather(8e9, 1, 1e9) == ring_all_reduce(8e9, 1, 1e9) == 0


@pytest.mark.parametrize(
    ("name", "gpus", "rate"),
    [
        ("A100-SXM4-40GB", 8, 300e9),
        ("RTX-4090", 8, 32e9),
        ("RTX-A6000", 2, 56.25e9),
        ("RTX-A6000", 4, 32e9),
    ],
)
def test_links_are_counted_in_one_direction(name: str, gpus: int, rate: float) -> None:
    assert link_rate(find_gpu(name), gpus) == rate


def test_gpus_that_copy_at_once_share_the_host_s_memory() -> None:
    assert [host_rate(A100, gpus) for gpus in (1, 4, 8)] == [32e9, 32e9, HOST_BANDWIDTH / 8]


# The step.


def micro_batches(samples: int, later: int) -> tuple[float, float]:
    """Seconds of computation and of recomputation of a first micro-batch and `later` more of so many samples."""
    compute = samples * ((FORWARD + BACKWARD) * (1 + later) + 0.01 * later)
    return compute, samples * RECOMPUTE * (1 + later)


def test_a_step_is_its_micro_batches_and_the_optimizer() -> None:
    speed = speed_of(Choice(4, 3, 12), samples=1200.0)
    compute, recompute = micro_batches(4, 2)
    optimizer = OPTIMIZER_BYTES / A100.bandwidth
    expected = {"compute": compute, "recompute": recompute, "optimizer": optimizer, "communication": 0.0, "offload": 0.0}
    assert speed.seconds == pytest.approx(expected)
    assert speed.step_seconds == pytest.approx(sum(expected.values()))
    assert speed.samples_per_second == pytest.approx(12 / speed.step_seconds)
    assert speed.tokens_per_second == pytest.approx(12 * TOKENS / speed.step_seconds)
    assert speed.gpu_hours == pytest.approx(100 * speed.step_seconds / 3600)
    assert speed.flop_utilisation == pytest.approx(12 * (FORWARD + BACKWARD + 0.01) / speed.step_seconds)


def test_ragged_micro_batches_are_timed_as_they_are() -> None:
    choice = Choice(4, 3, 10)
    assert micro_batch_sizes(choice) == ((4, 4, 2),)
    speed = speed_of(choice)
    assert speed.seconds["compute"] == pytest.approx(10 * (FORWARD + BACKWARD) + 6 * 0.01)


def test_the_gpu_with_most_samples_sets_the_pace() -> None:
    even, uneven = (speed_of(choice_of(micro_batch=2, accumulation=4, effective_batch=batch)) for batch in (64, 60))
    assert uneven.step_seconds == even.step_seconds
    assert uneven.samples_per_second == pytest.approx(even.samples_per_second * 60 / 64)


def test_a_form_of_one_shape_stands_for_parts_of_it() -> None:
    work = Work(products=[(Dimension(0, 312 * 10**12, 0),)])
    work.rows = [Row(piece, "forward", "aten.mm.default", "bfloat16", 1, 1, (0,), ()) for piece in ("first", "next")]
    speed = speed_of(Choice(4, 3, 10), ClosedForm(work=work, parameters=list(PARAMETERS)))
    assert speed.seconds["compute"] == pytest.approx(2.5)


def test_nothing_is_faster_than_a_launch() -> None:
    speed = speed_of(Choice(4, 3, 12), ClosedForm(parameters=list(PARAMETERS)))
    assert speed.step_seconds == LAUNCH_SECONDS


def test_hours_are_unknown_without_a_number_of_samples() -> None:
    assert speed_of(Choice(4, 3, 12)).gpu_hours is None


def test_a_speed_survives_json() -> None:
    speed = speed_of(choice_of(), samples=100.0)
    assert Speed.from_json(json.loads(json.dumps(speed.to_json()))) == speed


# Communication. A100s send 300 GB/s to each other, which hides everything.

SLOW = replace(A100, interconnect="", interconnect_bandwidth=None, pcie_bandwidth=2e9)
"""One GB/s in one direction."""
BEHIND = 4 * (RECOMPUTE + BACKWARD + 0.01)
"""Seconds of the last micro-batch of four samples behind which a reduction can hide."""


def communication(gpu: Gpu = SLOW, **knobs: Any) -> float:
    return speed_of(choice_of(**knobs), gpu=gpu).seconds["communication"]


def test_ddp_reduces_once_behind_the_last_backward() -> None:
    assert communication(replace(SLOW, pcie_bandwidth=2e7)) == pytest.approx(2 * TRAINED * 7 / 8 / 1e7 - BEHIND)
    assert communication(A100) == pytest.approx(2 * 25 * 1024**2 * 7 / 8 / 300e9)


def test_zero_1_reduces_to_owners_once_and_gathers_weights() -> None:
    gathered = TRAINED * 7 / 8 / 1e9
    assert communication(sharding="zero1", master_weights=True) == pytest.approx(gathered + max(0, TRAINED / 1e9 - BEHIND))


def test_zero_2_reduces_in_each_micro_batch() -> None:
    slow = replace(SLOW, pcie_bandwidth=2e7)
    reduced, gathered = TRAINED / 1e7, TRAINED * 7 / 8 / 1e7
    hidden = BEHIND + 4 * (RECOMPUTE + BACKWARD)
    assert communication(slow, sharding="zero2", master_weights=True) == pytest.approx(2 * reduced - hidden + gathered)


@pytest.mark.parametrize(
    ("knobs", "gathered", "wide"),
    [
        ({"sharding": "zero3", "master_weights": True}, 2, 1),
        ({"sharding": "fsdp2"}, 2, 1),
        ({"sharding": "fsdp2", "master_weights": True}, 2, 2),
        ({"sharding": "fsdp2-no-reshard"}, 1, 1),
    ],
)
def test_shards_are_gathered_and_reduced_in_each_micro_batch(knobs: dict[str, Any], gathered: int, wide: int) -> None:
    """What lies outside of the layers is gathered once, before the forward, and reduced after the backward: in the open."""
    slow = replace(SLOW, pcie_bandwidth=2e7)
    layers, outside = gathered * LAYERS + wide * TRAINED_LAYERS, EMBEDDING + wide * EMBEDDING
    hidden = 2 * 4 * (FORWARD + RECOMPUTE + BACKWARD) + 4 * 0.01
    assert communication(slow, **knobs) == pytest.approx(2 * (layers + outside) * 7 / 8 / 1e7 - hidden)
    assert communication(A100, **knobs) == pytest.approx(2 * outside * 7 / 8 / 300e9)


def test_hybrid_shards_within_a_node_and_reduces_between_nodes() -> None:
    slow = replace(SLOW, pcie_bandwidth=2e7)
    inside = (2 * LAYERS + EMBEDDING + TRAINED) * 3 / 4 / 1e7
    between = 2 * (TRAINED / 4) * (1 / 2) / NETWORK
    hidden = 2 * 4 * (FORWARD + RECOMPUTE + BACKWARD) + 4 * 0.01
    found = communication(slow, sharding="fsdp2-hybrid", nodes=2)
    assert found == pytest.approx(2 * (inside + between) - hidden)


def test_between_nodes_the_network_sets_the_rate() -> None:
    gathered = TRAINED * 7 / 8
    for nodes, gpu, rate in ((1, A100, 300e9), (2, A100, NETWORK), (2, SLOW, 1e9), (8, SLOW, NETWORK)):
        found = communication(gpu, sharding="zero2", master_weights=True, nodes=nodes)
        assert found == pytest.approx(gathered / rate), (nodes, rate)


# The optimizer and what waits in host memory.


@pytest.mark.parametrize(
    ("knobs", "ranks"),
    [
        ({"sharding": "ddp"}, 1),
        ({"sharding": "ddp", "master_weights": True}, 1),
        ({"sharding": "zero2", "master_weights": True}, 8),
        ({"sharding": "fsdp2"}, 8),
        ({"sharding": "fsdp2", "master_weights": True}, 8),
        ({"sharding": "fsdp2-hybrid", "nodes": 2}, 4),
    ],
)
def test_ranks_that_share_states_share_the_optimizer(knobs: dict[str, Any], ranks: int) -> None:
    """Float32 copies are twice as wide as what was traced; gradients are cast up, weights down, 2 and 4 bytes each."""
    moved = 2 * OPTIMIZER_BYTES + TRAINED // 2 * 12 if knobs.get("master_weights") else OPTIMIZER_BYTES
    assert speed_of(choice_of(**knobs)).seconds["optimizer"] == pytest.approx(moved / ranks / A100.bandwidth)


@pytest.mark.parametrize(
    ("knobs", "ranks", "wide"),
    [({"sharding": "ddp"}, 1, 1), ({"sharding": "fsdp2"}, 8, 1), ({"sharding": "fsdp2", "master_weights": True}, 8, 2)],
)
def test_an_optimizer_on_the_host_waits_for_its_memory_and_for_pcie(knobs: dict[str, Any], ranks: int, wide: int) -> None:
    seconds = speed_of(choice_of(optimizer_offload=True, **knobs)).seconds
    clipping = CLIPPING_PASSES * TRAINED / ranks / A100.bandwidth
    assert seconds["optimizer"] == pytest.approx(clipping + ADAMW_PASSES * wide * TRAINED * 8 / ranks / HOST_BANDWIDTH)
    assert seconds["offload"] == pytest.approx(2 * TRAINED / ranks / 25.6e9)


def test_inputs_of_blocks_go_down_and_up() -> None:
    """Two blocks of the language model; the vision tower's keep their inputs on the GPU."""
    kept, offloaded = (speed_of(choice_of(checkpointing=value)).seconds for value in ("blocks", "blocks-offload"))
    assert kept["offload"] == 0
    assert offloaded["offload"] == pytest.approx(2 * (2 * 8 * TOKENS * HIDDEN * 2) / 25.6e9)


# Properties.


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_larger_micro_batch_is_never_slower(one: int, other: int) -> None:
    small, large = sorted((one, other))
    work = Work()
    for piece in ("first", "next"):
        for phase in ("forward", "recompute", "backward"):
            row(work, piece, phase, 10**9, 10**6, times=40)
            row(work, piece, phase, 10**12, 10**6)
    found = [cost(ClosedForm(work=work), Shape(n, TOKENS, n), A100) for n in (small, large)]
    per_sample = [sum(made.first + made.next) / n for made, n in zip(found, (small, large), strict=True)]
    assert per_sample[1] <= per_sample[0] * (1 + 1e-9)


@given(st.sampled_from(["none", "ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2-no-reshard"]), st.integers(1, 8))
def test_recomputation_is_never_free(sharding: str, micro_batch: int) -> None:
    without = made_form()
    without.work.rows = [row for row in without.work.rows if row.phase != "recompute"]
    gpus = 1 if sharding == "none" else 8
    choice = choice_of(sharding=sharding, gpus=gpus, effective_batch=gpus * 8, micro_batch=micro_batch)
    choice = replace(choice, accumulation=-(-8 // micro_batch))
    for gpu in (A100, SLOW):
        assert speed_of(choice, gpu=gpu).step_seconds >= speed_of(choice, without, gpu=gpu).step_seconds


@pytest.mark.parametrize("sharding", ["none", "ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2-no-reshard", "fsdp2-hybrid"])
def test_every_sharding_is_timed_on_every_card(sharding: str) -> None:
    gpus, nodes = (1, 1) if sharding == "none" else (16, 2)
    choice = choice_of(sharding=sharding, gpus=gpus, nodes=nodes, effective_batch=gpus * 8)
    for gpu in catalogue():
        speed = speed_of(choice, gpu=gpu)
        assert all(seconds >= 0 for seconds in speed.seconds.values())
        assert 0 < speed.flop_utilisation <= 1


def test_costs_that_are_kept_are_those_of_their_form_and_card() -> None:
    costs: dict[Any, Any] = {}
    forms = [made_form(), made_form(accumulates=0.5)]
    for _ in range(2):
        for form in forms:
            for gpu in (A100, SLOW):
                for choice in (choice_of(), choice_of(sharding="fsdp2", master_weights=True), choice_of(micro_batch=8)):
                    assert speed_of(choice, form, gpu, costs=costs) == speed_of(choice, form, gpu)
