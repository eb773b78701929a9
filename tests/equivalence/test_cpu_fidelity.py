"""What the tracer says that a training step allocates is what the same step allocates, run for real on the CPU."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, PhiConfig, PretrainedConfig, Qwen3MoeConfig

from oomph.core.layout import Shape
from oomph.live.model import compose_llava
from oomph.live.simulate import Setup

BOUND = 0.005
NUMBER = 8
SYNONYMS = {"aten::lift_fresh": "aten::empty", "aten::new_zeros": "aten::zeros"}

# Operators whose CPU kernels take scratch, and what for.
KERNELS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "scores of one tile",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "scores and their gradient of one tile",
    "aten::convolution": "the image's patches as columns",
    "aten::convolution_backward": "the image's patches as columns, and contiguous copies",
    "aten::native_layer_norm": "a contiguous copy of its input",
    "aten::native_layer_norm_backward": "sums of the weight's gradient for each thread",
    "aten::masked_scatter_backward": "the mask as numbers and their running sum",
    "aten::sum": "bools as 64-bit integers",
    "aten::cumsum": "32-bit integers or bools as 64-bit integers",
    "aten::histc": "the edges and the counts for each thread",
    "aten::sort": "the indices of a stable sort",
}


class Difference(NamedTuple):
    """A birth that one side alone has."""

    side: str
    phase: str
    event: Any


# docs/fidelity.md says more about each. The first that fits is the cause.
CAUSES: dict[str, Callable[[Difference, Any], bool]] = {
    "Scratch of CPU kernels": lambda d, case: d.event.inside and d.event.nbytes > NUMBER and d.event.op in KERNELS,
    "State of the random generator": lambda d, case: (
        d.side == "measured"
        and not d.event.op
        and d.event.nbytes == torch.get_rng_state().nbytes
        and (case.setup.checkpointing == "blocks" or case.setup.loss == "chunked")
    ),
    "Search for packed samples": lambda d, case: (
        d.side == "measured" and d.event.op in ("aten::eq", "aten::all") and d.event.nbytes <= case.shape.samples
    ),
    "Numbers": lambda d, case: d.event.nbytes <= NUMBER,
    "Sums of gradients": lambda d, case: d.side == "traced" and d.event.op == "aten::add",
    "Gradients of indexing": lambda d, case: d.side == "traced" and d.event.op in ("aten::index_put", "aten::scatter"),
}


def llava(language: PretrainedConfig) -> PretrainedConfig:
    """LLaVA's configuration with a small CLIP tower."""
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=112, patch_size=14
    )
    return compose_llava(vision, language, -2, "patch")


def phi() -> PretrainedConfig:
    """LLaVA with a Phi."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    return llava(PhiConfig(vocab_size=2048, num_key_value_heads=4, max_position_embeddings=512, **sizes))


def llama() -> PretrainedConfig:
    """LLaVA with a Llama, two query heads to a key head."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    return llava(LlamaConfig(vocab_size=2048, num_key_value_heads=2, max_position_embeddings=512, **sizes))


def qwen() -> PretrainedConfig:
    """A Qwen3-MoE, two of eight experts for each token."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 32}
    return Qwen3MoeConfig(vocab_size=4096, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, **sizes)


class Trained(NamedTuple):
    """A row of the page's table: the model and how it is trained."""

    model: Callable[[], PretrainedConfig]
    checkpointing: str = "none"
    frozen: tuple[str, ...] = ()
    attention: str = "sdpa"
    loss: str = "full"
    optimizer: str = "adamw-foreach"
    slow: bool = False


CASES = {
    "LLaVA Phi": Trained(phi),
    "LLaVA Phi, frozen tower": Trained(phi, frozen=("vision",), slow=True),
    "LLaVA Phi, checkpointing": Trained(phi, "blocks", slow=True),
    "LLaVA Phi, checkpointing, frozen tower": Trained(phi, "blocks", ("vision",)),
    "LLaVA Phi, checkpointing, frozen tower, eager-fp32 attention, full-shifted loss": Trained(
        phi, "blocks", ("vision",), "eager-fp32", "full-shifted", slow=True
    ),
    "LLaVA Llama": Trained(llama, optimizer="adamw-fused", slow=True),
    "LLaVA Llama, frozen tower": Trained(llama, frozen=("vision",), optimizer="adamw-fused"),
    "LLaVA Llama, checkpointing": Trained(llama, "blocks", optimizer="adamw-fused", slow=True),
    "LLaVA Llama, checkpointing, frozen tower": Trained(llama, "blocks", ("vision",), optimizer="adamw-fused", slow=True),
    "LLaVA Llama, chunked loss": Trained(llama, loss="chunked", optimizer="adamw-fused", slow=True),
    "Qwen3-MoE": Trained(qwen, optimizer="adamw-loop"),
    "Qwen3-MoE, checkpointing": Trained(qwen, "blocks", optimizer="adamw-loop", slow=True),
}
MARKED = [pytest.param(name, marks=[pytest.mark.slow] * trained.slow) for name, trained in CASES.items()]


class Compared(NamedTuple):
    """A case with its step on both sides, and the births that one side alone has."""

    case: Any
    traced: Any
    measured: Any
    differences: list[Difference]
    deaths: dict[str, Counter[int]]

    def cause(self, difference: Difference) -> str:
        """The name of the difference's cause, empty where there is none."""
        return next((name for name, explains in CAUSES.items() if explains(difference, self.case)), "")

    def unexplained(self) -> list[str]:
        """The differences without a cause, in words."""
        rows = [d for d in self.differences if not self.cause(d)]
        return [f"{d.phase}: {d.event.nbytes} bytes, {d.event.op or 'no operator'} {d.event.module}, only {d.side}" for d in rows]


@pytest.fixture(scope="module")
def compared(make_case: Any, run_twice: Any) -> Callable[[str], Compared]:
    """A function from a case's name to its comparison, which remembers what it has compared."""
    known: dict[str, Compared] = {}

    def compare(name: str) -> Compared:
        if name not in known:
            row = CASES[name]
            setup = Setup(row.attention, row.loss, row.optimizer, row.checkpointing, None)
            config, moe = row.model(), row.model is qwen
            case = make_case(config, torch.bfloat16 if moe else torch.float32, row.frozen, setup, Shape(2, 256, 0 if moe else 2))
            traced, measured = run_twice(case)
            known[name] = Compared(case, traced, measured, *differences(traced, measured))
        return known[name]

    return compare


def differences(traced: Any, measured: Any) -> tuple[list[Difference], dict[str, Counter[int]]]:
    """The births that one side alone has, and the sizes of the deaths that one side alone has.

    What a kernel allocates and frees inside one call is set aside; then both sequences are aligned, births by operator
    and bytes and deaths by bytes.
    """
    found = [Difference("measured", p, e) for p, events in measured.phases.items() for e in events if e.inside and e.nbytes > 0]
    deaths = {"traced": Counter[int](), "measured": Counter[int]()}
    for phase in traced.phases:
        sides = {"traced": traced.phases[phase], "measured": [e for e in measured.phases[phase] if not e.inside]}
        first, second = ([(e.nbytes, SYNONYMS.get(e.op, e.op) if e.nbytes > 0 else "") for e in events] for events in sides.values())
        for (side, events), alone in zip(sides.items(), unmatched(first, second), strict=True):
            found += [Difference(side, phase, events[at]) for at in alone if events[at].nbytes > 0]
            deaths[side].update(-events[at].nbytes for at in alone if events[at].nbytes < 0)
    return found, deaths


def unmatched(first: list[Any], second: list[Any]) -> tuple[list[int], list[int]]:
    """What of two sequences is not in a longest common subsequence, as positions.

    The greedy algorithm of E. W. Myers, "An O(ND) difference algorithm and its variations", 1986.
    """
    reached, steps = {1: 0}, list[dict[int, int]]()
    for edits in itertools.count():
        steps.append(dict(reached))
        for line in range(-edits, edits + 1, 2):
            down = line == -edits or (line != edits and reached[line - 1] < reached[line + 1])
            x = reached[line + 1] if down else reached[line - 1] + 1
            while x < len(first) and x - line < len(second) and first[x] == second[x - line]:
                x += 1
            reached[line] = x
            if x >= len(first) and x - line >= len(second):
                return _walk_back(steps, len(first), len(second))
    raise AssertionError


def _walk_back(steps: list[dict[int, int]], x: int, y: int) -> tuple[list[int], list[int]]:
    alone: tuple[list[int], list[int]] = [], []
    for edits in range(len(steps) - 1, 0, -1):
        reached, line = steps[edits], x - y
        down = line == -edits or (line != edits and reached[line - 1] < reached[line + 1])
        before = line + 1 if down else line - 1
        x = reached[before]
        y = x - before
        alone[down].append(y if down else x)
    return alone[0][::-1], alone[1][::-1]


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
    pair = compared(name)
    assert not pair.unexplained(), "\n".join(pair.unexplained())
    for side, deaths in pair.deaths.items():
        births = Counter(d.event.nbytes for d in pair.differences if d.side == side and not d.event.inside)
        assert deaths == births, f"storages that both sides have die at another moment on the {side} side"
