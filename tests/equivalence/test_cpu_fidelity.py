"""What the tracer says that a training step allocates is what the same step allocates, run for real on the CPU.

docs/fidelity.md explains what is compared, and every cause of a difference.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlamaConfig, PhiConfig, PretrainedConfig, Qwen3MoeConfig

from oomph.core.layout import Shape
from oomph.live.model import compose_llava
from oomph.live.simulate import Setup
from oomph.records import Attention, Checkpointing, Loss, Optimizer, Precision

BOUND = 0.005
NUMBER = 8
SHAPE = Shape(2, 256, 2)
MIXED_SHAPE = Shape(2, 96, 2)
"""Products of 16-bit numbers take long on a CPU without oneDNN."""
SYNONYMS = {"aten::lift_fresh": "aten::empty", "aten::new_zeros": "aten::zeros"}

# Operators whose CPU kernels take scratch, and what for.
KERNELS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "scores of one tile",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "scores of one tile and their gradient",
    "aten::convolution": "patches of the image as columns",
    "aten::convolution_backward": "patches of the image as columns, a contiguous gradient",
    "aten::native_layer_norm": "a contiguous input",
    "aten::native_layer_norm_backward": "gradients of weight and bias, summed for each thread",
    "aten::masked_scatter_backward": "the mask as 64-bit integers, and their running sum",
    "aten::sum": "bools as 64-bit integers",
    "aten::add": "an operand in the type of the other",
    "aten::mul": "an operand in the type of the other",
    "aten::cumsum": "bools or 32-bit integers as 64-bit integers",
    "aten::histc": "edges of the bins, counts for each thread",
    "aten::sort": "positions, from which the indices are copied",
}


class Difference(NamedTuple):
    """A birth that one side alone has."""

    side: str
    phase: str
    event: Any

    def __str__(self) -> str:
        where = f" in {self.event.module}" if self.event.module else ""
        return f"{self.phase}: {self.event.nbytes} bytes by {self.event.op or 'no operator'}{where}, only {self.side}"


# The first that fits is the cause.
Cause = Callable[[Difference, Any], bool]
CAUSES: dict[str, Cause] = {
    "Scratch of CPU kernels": lambda d, case: d.event.inside and d.event.nbytes > NUMBER and d.event.op in KERNELS,
    "State of the random generator": lambda d, case: (
        d.side == "measured" and not d.event.op and d.event.nbytes == torch.get_rng_state().nbytes and _recomputes(case)
    ),
    "Search for packed samples": lambda d, case: (
        d.side == "measured" and d.event.op in ("aten::eq", "aten::all") and d.event.nbytes <= case.shape.samples
    ),
    "Numbers": lambda d, case: d.event.nbytes <= NUMBER,
}
# What the tracer records too much of. An entry goes when the tracer no longer does.
SURPLUS: dict[str, Cause] = {
    "Bias of a linear layer": lambda d, case: _surplus(d, "aten::add") and "linear" in d.event.module,
}


def _recomputes(case: Any) -> bool:
    return bool(case.setup.checkpointing != "none")


def _surplus(difference: Difference, op: str) -> bool:
    return difference.side == "traced" and not difference.phase.startswith("backward") and difference.event.op == op


# Models.


def llava(language: PretrainedConfig) -> PretrainedConfig:
    """LLaVA with a small CLIP tower."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    return compose_llava(CLIPVisionConfig(image_size=112, patch_size=14, **sizes), language, -2, "patch")


TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 2048,
}


def phi() -> PretrainedConfig:
    """LLaVA with a Phi."""
    return llava(PhiConfig(num_key_value_heads=4, max_position_embeddings=512, **TEXT))


def llama() -> PretrainedConfig:
    """LLaVA with a Llama, two query heads to a key head."""
    return llava(LlamaConfig(num_key_value_heads=2, max_position_embeddings=512, **TEXT))


def qwen() -> PretrainedConfig:
    """A Qwen3-MoE, two of eight experts to a token."""
    sizes: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 3}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return Qwen3MoeConfig(num_experts=8, num_experts_per_tok=2, **sizes, **heads)


class Trained(NamedTuple):
    """A model and how it is trained."""

    model: Callable[[], PretrainedConfig]
    optimizer: Optimizer
    checkpointing: Checkpointing = "none"
    frozen: tuple[str, ...] = ()
    attention: Attention = "sdpa"
    loss: Loss = "full"
    precision: Precision = "float32"
    slow: bool = True


TOWER = ("vision",)
CASES = {
    "LLaVA Phi": Trained(phi, "adamw-foreach", slow=False),
    "LLaVA Phi, frozen tower": Trained(phi, "adamw-foreach", frozen=TOWER),
    "LLaVA Phi, checkpointing": Trained(phi, "adamw-foreach", "blocks"),
    "LLaVA Phi, checkpointing, frozen tower": Trained(phi, "adamw-foreach", "blocks", TOWER, slow=False),
    "LLaVA Phi, checkpointing, frozen tower, eager-fp32, full-shifted": Trained(
        phi, "adamw-foreach", "blocks", TOWER, "eager-fp32", "full-shifted"
    ),
    "LLaVA Phi, every-2, frozen tower": Trained(phi, "adamw-foreach", "every-2", TOWER),
    "LLaVA Llama": Trained(llama, "adamw-fused"),
    "LLaVA Llama, frozen tower": Trained(llama, "adamw-fused", frozen=TOWER, slow=False),
    "LLaVA Llama, checkpointing": Trained(llama, "adamw-fused", "blocks"),
    "LLaVA Llama, checkpointing, frozen tower": Trained(llama, "adamw-fused", "blocks", TOWER),
    "LLaVA Llama, blocks-offload, frozen tower": Trained(llama, "adamw-fused", "blocks-offload", TOWER, slow=False),
    "LLaVA Llama, chunked": Trained(llama, "adamw-fused", loss="chunked"),
    "LLaVA Llama, bfloat16-mixed": Trained(llama, "adamw-fused", precision="bfloat16-mixed"),
    "LLaVA Llama, checkpointing, frozen tower, bfloat16-mixed": Trained(
        llama, "adamw-fused", "blocks", TOWER, precision="bfloat16-mixed", slow=False
    ),
    "LLaVA Llama, checkpointing, frozen tower, float16-mixed": Trained(
        llama, "adamw-fused", "blocks", TOWER, precision="float16-mixed"
    ),
    # torch's grouped_mm on fake tensors takes bfloat16 alone.
    "Qwen3-MoE": Trained(qwen, "adamw-loop", precision="bfloat16", slow=False),
    "Qwen3-MoE, checkpointing": Trained(qwen, "adamw-loop", "blocks", precision="bfloat16"),
}
MARKED = [pytest.param(name, marks=[pytest.mark.slow] * trained.slow) for name, trained in CASES.items()]


# Comparing.


class Compared(NamedTuple):
    """A case with its step on both sides, the births that one side alone has, and the sizes of the deaths it alone has."""

    case: Any
    traced: Any
    measured: Any
    differences: list[Difference]
    deaths: dict[str, Counter[int]]

    def causes(self) -> Counter[str]:
        """The names of the differences' causes, and how many they explain; the empty name for those without."""
        return Counter(self.cause(difference) for difference in self.differences)

    def cause(self, difference: Difference) -> str:
        """The name of a difference's cause, empty where there is none."""
        return next((name for name, explains in (CAUSES | SURPLUS).items() if explains(difference, self.case)), "")

    def problems(self) -> list[str]:
        """The differences that nothing explains."""
        found = [str(difference) for difference in self.differences if not self.cause(difference)]
        for side, deaths in self.deaths.items():
            births = Counter(d.event.nbytes for d in self.differences if d.side == side and not d.event.inside)
            if births != deaths:
                found.append(f"storages of {sorted((births - deaths) + (deaths - births))} bytes die at another moment, {side}")
        return found


def compare(case: Any, traced: Any, measured: Any) -> Compared:
    """Aligns the two steps phase by phase, births by operator and bytes, deaths by bytes.

    What a kernel allocates and frees inside one call is set aside before.
    """
    found = [Difference("measured", p, e) for p, events in measured.phases.items() for e in events if e.inside and e.nbytes > 0]
    deaths = {"traced": Counter[int](), "measured": Counter[int]()}
    for phase in traced.phases:
        sides = {"traced": traced.phases[phase], "measured": [e for e in measured.phases[phase] if not e.inside]}
        if case.arithmetic.autocast is not None:
            sides = {side: _in_any_order(events) for side, events in sides.items()}
        keys = [[(e.nbytes, SYNONYMS.get(e.op, e.op) if e.nbytes > 0 else "") for e in events] for events in sides.values()]
        for (side, events), alone in zip(sides.items(), unmatched(*keys), strict=True):
            found += [Difference(side, phase, events[at]) for at in alone if events[at].nbytes > 0]
            deaths[side].update(-events[at].nbytes for at in alone if events[at].nbytes < 0)
    return Compared(case, traced, measured, found, deaths)


def _in_any_order(events: list[Any]) -> list[Any]:
    """The events with the ends of casts that follow each other sorted: autocast's cache drops them in an order of addresses."""
    groups = itertools.groupby(events, lambda event: event.nbytes < 0 and event.op == "aten::_to_copy")
    return [event for ends, run in groups for event in (sorted(run, key=lambda e: e.nbytes) if ends else run)]


def unmatched(first: list[Any], second: list[Any]) -> tuple[list[int], list[int]]:
    """The positions in both sequences that are not in a longest common subsequence.

    The greedy algorithm of E. W. Myers, "An O(ND) difference algorithm and its variations", Algorithmica 1, 1986.
    """
    reached, steps = {1: 0}, list[dict[int, int]]()
    for edits in itertools.count():
        steps.append(dict(reached))
        for line in range(-edits, edits + 1, 2):
            x = reached[line + 1] if _from_second(reached, edits, line) else reached[line - 1] + 1
            while x < len(first) and x - line < len(second) and first[x] == second[x - line]:
                x += 1
            reached[line] = x
            if x >= len(first) and x - line >= len(second):
                return _walk_back(steps, len(first), len(second))
    raise AssertionError


def _from_second(reached: dict[int, int], edits: int, line: int) -> bool:
    return line == -edits or (line != edits and reached[line - 1] < reached[line + 1])


def _walk_back(steps: list[dict[int, int]], x: int, y: int) -> tuple[list[int], list[int]]:
    alone: tuple[list[int], list[int]] = [], []
    for edits in range(len(steps) - 1, 0, -1):
        line = x - y
        second = _from_second(steps[edits], edits, line)
        line += 1 if second else -1
        x = steps[edits][line]
        y = x - line
        alone[second].append(y if second else x)
    return alone[0][::-1], alone[1][::-1]


@pytest.fixture(scope="module")
def compared(make_case: Any, run_twice: Any) -> Callable[[str], Compared]:
    """A function from a case's name to its comparison, which remembers what it has compared."""
    known: dict[str, Compared] = {}

    def find(name: str) -> Compared:
        if name not in known:
            trained = CASES[name]
            shape = MIXED_SHAPE if trained.precision.endswith("-mixed") else SHAPE
            shape = shape._replace(images=0) if trained.model is qwen else shape
            vision = "blocks" if trained.checkpointing == "blocks" else "none"
            knobs = trained.attention, trained.loss, trained.optimizer, trained.checkpointing, vision
            setup = Setup(*knobs, None, precision=trained.precision)
            case = make_case(trained.model(), trained.frozen, setup, shape)
            known[name] = compare(case, *run_twice(case))
        return known[name]

    return find


# Tests.


@pytest.mark.parametrize("name", MARKED)
def test_the_peaks_agree(name: str, compared: Callable[[str], Compared]) -> None:
    pair = compared(name)
    assert pair.traced.before == pair.measured.before
    traced, measured = pair.traced.peaks(), pair.measured.peaks()
    assert list(traced) == list(measured) == ["forward 1", "backward 1", "forward 2", "backward 2", "optimizer"]
    for phase, peak in measured.items():
        assert traced[phase] == pytest.approx(peak, rel=BOUND), phase


@pytest.mark.parametrize("name", MARKED)
def test_every_difference_has_a_cause(name: str, compared: Callable[[str], Compared]) -> None:
    problems = compared(name).problems()
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", MARKED)
def test_an_evaluation_agrees(name: str, compared: Callable[[str], Compared]) -> None:
    step = compared(name)
    pair = compare(step.case, step.traced.evaluated(), step.measured.evaluated())
    assert pair.traced.before == pair.measured.before
    assert not pair.problems(), "\n".join(pair.problems())
    assert pair.traced.peaks()["evaluate"] == pytest.approx(pair.measured.peaks()["evaluate"], rel=BOUND)


def test_a_difference_without_a_cause_is_found(compared: Callable[[str], Compared]) -> None:
    pair = compared("LLaVA Phi")
    phase = "backward 1"
    events = pair.measured.phases[phase]
    birth = next(at for at, event in enumerate(events) if event.op == "aten::mm")
    death = next(at for at, event in enumerate(events) if event.op == "aten::mm" and event.nbytes < 0)
    for spoilt in (
        events[:birth] + events[birth + 1 :],
        [*events[:birth], events[birth]._replace(nbytes=4), *events[birth + 1 :]],
        [*events[: birth + 1], *events[birth:]],
        events[:death] + events[death + 1 :],
        [*events[:death], *events[death + 1 :], events[death]],
    ):
        step = replace(pair.measured, phases={**pair.measured.phases, phase: spoilt})
        assert compare(pair.case, pair.traced, step).problems()


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_the_alignment_is_a_longest_common_subsequence(first: list[int], second: list[int]) -> None:
    common = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, j in itertools.product(range(len(first)), range(len(second))):
        common[i + 1][j + 1] = common[i][j] + 1 if first[i] == second[j] else max(common[i][j + 1], common[i + 1][j])
    alone = unmatched(first, second)
    kept = [[x for at, x in enumerate(s) if at not in gone] for s, gone in zip((first, second), alone, strict=True)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == common[-1][-1]


@pytest.mark.slow
def test_every_cause_is_still_one(compared: Callable[[str], Compared]) -> None:
    pairs = [compared(name) for name in CASES]
    seen = {name for pair in pairs for name in pair.causes()}
    assert seen - {""} == set(CAUSES | SURPLUS), "delete the causes that explain nothing any more, here and on the page"
    kernels = {d.event.op for pair in pairs for d in pair.differences if pair.cause(d) == "Scratch of CPU kernels"}
    assert kernels == set(KERNELS)


@pytest.mark.slow
def test_the_page_shows_these_results(root: Path, compared: Callable[[str], Compared]) -> None:
    page = (root / "docs" / "fidelity.md").read_text(encoding="utf-8")
    for cause in CAUSES | SURPLUS:
        assert f"**{cause}**" in page
    for kernel, scratch in KERNELS.items():
        assert f"`{kernel.removeprefix('aten::')}`: {scratch}" in page
    rows = [_row(name, compared(name)) for name in CASES]
    shown = [line for line in page.splitlines() if line.startswith(("| LLaVA", "| Qwen"))]
    assert shown == rows, "docs/fidelity.md has to show\n" + "\n".join(rows)


def _row(name: str, pair: Compared) -> str:
    """The case's row of the page's table."""
    traced, measured = max(pair.traced.peaks().values()), max(pair.measured.peaks().values())
    births = sum(event.nbytes > 0 for events in pair.traced.phases.values() for event in events)
    matched = births - sum(d.side == "traced" for d in pair.differences)
    return f"| {name} | {traced:,} | {measured:,} | {traced - measured:+,} | {births:,} | {matched:,} |"
