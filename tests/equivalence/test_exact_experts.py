"""One trajectory of a model with experts, however a step is cut, for each way of keeping their load even but one.

Cuts differ in the order of sums alone: losses and parameters stay within 1e-6 of each other after some steps. The balance of
each micro-batch, as published code has it, is the exception, and how far it strays is printed.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedModel

from oomph.core.admission import Admission, Cost, Split
from oomph.core.layout import Shape
from oomph.errors import RunError
from oomph.live.balance import apply_balance, routers_of
from oomph.live.data import encoding
from oomph.live.data.collating import Collator, Prepared
from oomph.live.engine import Engine, StepResult
from oomph.live.exactness import exactness_of
from oomph.live.experts import Router
from oomph.live.model import build, compose_llava, part_finder
from oomph.live.moe import upcycle
from oomph.live.optimizers import optimizer_over
from oomph.recipe import Experts
from oomph.recipe.schema import Balance
from oomph.records import Choice

STEPS, EACH, PATCHES, IMAGE = 5, 8, 4, 127
TOLERANCE = 1e-6
PLAIN = Choice(EACH, 1, EACH, precision="float32")
BLOCKS = replace(PLAIN, checkpointing="blocks", vision_checkpointing="blocks")
BALANCES: dict[str, Balance | None] = {
    "none": None,
    "sequence": Balance(kind="sequence", coefficient=0.1, z_loss=0.01),
    "group": Balance(kind="group", group=2, coefficient=0.1),
    "bias": Balance(kind="bias", bias_rate=0.01, z_loss=0.01),
    "micro-batch": Balance(kind="micro-batch", coefficient=0.1),
}
EXACT = [name for name in BALANCES if name != "micro-batch"]


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@functools.cache
def model_of() -> PreTrainedModel:
    """A LLaVA whose tower is frozen, with four experts that differ in each layer. Take a copy."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(num_key_value_heads=1, vocab_size=128, max_position_embeddings=64, **sizes)
    config = compose_llava(CLIPVisionConfig(image_size=28, patch_size=14, **sizes), text, -2, "patch")
    model = type(build(config, torch.float32, "sdpa"))(config)
    upcycle(model, Experts(count=4, top_k=2, layers="all"))
    part = part_finder(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part(name) != "vision")
            if part(name) in ("experts", "router"):
                parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    return model.train()


@functools.cache
def samples_of() -> list[Prepared]:
    """Of different lengths, two of three with an image, half of each without labels."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(STEPS * EACH):
        seen = int(number % 3 != 2)
        tokens = int(torch.randint(6, 14, (1,), generator=generator)) + PATCHES * seen
        ids = torch.randint(1, 120, (tokens,), generator=generator)
        ids[1 : 1 + PATCHES * seen] = IMAGE
        labels = ids.clone()
        labels[: tokens // 2] = -100
        labels[ids == IMAGE] = -100
        pictures = ({"pixel_values": torch.randn(1, 3, 28, 28, generator=generator)},) * seen
        known = encoding.Cost(0, PATCHES * seen, tokens, seen, PATCHES * seen, int((labels[1:] != -100).sum()))
        made.append(Prepared(number, f"sample {number}", ids, labels, pictures, known))
    return made


@dataclass
class Cuts:
    """Cuts every step into micro-batches of the first sizes, and after a failure into those of the next."""

    sizes: Sequence[Sequence[int]]
    padded: int = 1
    at: int = 0
    limit_bytes: int = 0

    def split(self, costs: Sequence[Cost]) -> Split:
        ends = torch.tensor(self.sizes[self.at]).cumsum(0).tolist()
        pieces = tuple(tuple(range(end - size, end)) for end, size in zip(ends, self.sizes[self.at], strict=True))
        return Split(pieces, tuple(Shape(len(p), self.padded, 1) for p in pieces), tuple(map(len, pieces)), 1.0)

    def failed(self, split: Split, micro_batch: int) -> None:
        self.at += 1

    def committed(self) -> None: ...

    def shrink(self) -> None: ...

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None: ...


@dataclass
class Bomb:
    """Raises out of memory in one of the calls of hooks: before and after a module's forward, at its output's gradient."""

    at: int = -1
    calls: int = 0
    handles: list[Any] = field(default_factory=list)

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def attach(self, model: nn.Module) -> None:
        for module in model.modules():
            self.handles += [module.register_forward_pre_hook(self), module.register_forward_hook(self._after)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self)


class Trajectory(NamedTuple):
    losses: list[float]
    tensors: dict[str, Tensor]
    steps: list[StepResult]


def engine_of(name: str, admit: Any, choice: Choice) -> tuple[Engine[Prepared], PreTrainedModel]:
    model = copy.deepcopy(model_of())
    apply_balance(model, BALANCES[name])
    optimizer = optimizer_over([p for p in model.parameters() if p.requires_grad], "adamw-foreach", lr=3e-4)
    collator = Collator(model.config, IMAGE, 0)
    admit = admit if callable(admit) else functools.partial(lambda cuts, _: cuts, Cuts(admit))
    return Engine(model, optimizer, choice, admit, lambda samples, tokens: collator(samples, tokens=tokens)), model


def go(name: str, admit: Any, choice: Choice = PLAIN, bombs: dict[int, int] | None = None, steps: int = STEPS) -> Trajectory:
    engine, model = engine_of(name, admit, choice)
    done = []
    for number in range(steps):
        bomb = Bomb((bombs or {}).get(number, -1))
        if bomb.at >= 0:
            bomb.attach(model)
        done.append(engine.step(number, samples_of()[number * EACH : (number + 1) * EACH]))
        bomb.remove()
    tensors = {key: tensor.detach().clone() for key, tensor in model.state_dict().items() if "vision" not in key}
    return Trajectory([step.loss for step in done if step.loss is not None], tensors, done)


@functools.cache
def reference(name: str) -> Trajectory:
    """All samples of a step at once."""
    return go(name, [[EACH // units(name)]])


def added(run: Trajectory) -> list[float]:
    """What a balance adds to the loss of each step."""
    terms = [term for step in run.steps for term in (step.routed.balance_loss, step.routed.z_loss)]
    return [term for term in terms if term is not None]


def units(name: str) -> int:
    """Samples that are cut together."""
    balance = BALANCES[name]
    return balance.group if balance is not None else 1


def distance(one: Trajectory, other: Trajectory) -> float:
    """The largest difference of a parameter, relative to its norm."""
    pairs = [(one.tensors[key], tensor) for key, tensor in other.tensors.items()]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


CASES: list[tuple[str, Any, Choice, dict[int, int] | None]] = [
    ("2 × 4", [[4, 4]], PLAIN, None),
    ("1 × 8", [[1] * 8], PLAIN, None),
    ("ragged, checkpointing", [[3, 3, 2]], BLOCKS, None),
    ("chunked, padded", lambda choice: Cuts([[4, 4]], 24), replace(PLAIN, loss="chunked"), None),
    ("out of memory twice", [[8], [6, 2], [2] * 4], BLOCKS, {2: 40, 3: 150}),
]
GROUPED: list[tuple[str, Any, Choice, dict[int, int] | None]] = [
    ("4 × 2", [[1] * 4], PLAIN, None),
    ("6 + 2, checkpointing", [[3, 1]], BLOCKS, None),
    ("chunked, padded", lambda choice: Cuts([[2, 2]], 24), replace(PLAIN, loss="chunked"), None),
    ("out of memory twice", [[4], [3, 1], [1] * 4], BLOCKS, {2: 40, 3: 150}),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_every_cut_gives_one_trajectory(name: str) -> None:
    expected = reference(name)
    for what, admit, choice, bombs in GROUPED if name == "group" else CASES:
        done = go(name, admit, choice, bombs)
        far = distance(done, expected)
        print(f"{name}, {what}: {far:.1e} of a norm")
        assert done.losses == pytest.approx(expected.losses, rel=TOLERANCE, abs=0), what
        assert far < TOLERANCE, what
        assert [step.routed.experts for step in done.steps] == [step.routed.experts for step in expected.steps], what
        assert sum(len(step.recoveries) for step in done.steps) == len(bombs or {})
        assert added(done) == pytest.approx(added(expected), rel=1e-5), what


@pytest.mark.slow
def test_the_balance_of_micro_batches_is_not_exact_and_says_so() -> None:
    expected = reference("micro-batch")
    for sizes in ([4, 4], [1] * 8):
        far = distance(go("micro-batch", [sizes]), expected)
        print(f"micro-batch, {'+'.join(map(str, sizes))}: {far:.1e} of a norm")
        assert far > 100 * TOLERANCE
    _, model = engine_of("micro-batch", [[8]], PLAIN)
    assert any("balance.kind micro-batch" in sentence for sentence in exactness_of(model))
    for name in EXACT:
        assert exactness_of(engine_of(name, [[8]], PLAIN)[1]) == []


@pytest.mark.parametrize("name", ["sequence", "bias", "micro-batch"])
def test_a_step_that_was_redone_gives_the_bits_of_one_that_was_cut_like_it(name: str) -> None:
    planned = go(name, [[3, 3, 2]], BLOCKS, steps=2)
    for call in (20, 90, 150):
        redone = go(name, lambda choice: Cuts([[8], [3, 3, 2]]), BLOCKS, {0: call}, steps=1)
        assert len(redone.steps[0].recoveries) == 1
        assert redone.steps[0].routed == planned.steps[0].routed
        assert redone.losses[0] == planned.losses[0]
    redone = go(name, lambda choice: Cuts([[8], [3, 3, 2]]), BLOCKS, {0: 90}, steps=2)
    assert all(torch.equal(redone.tensors[key], tensor) for key, tensor in planned.tensors.items())


def test_biases_move_once_a_step_against_the_load() -> None:
    engine, model = engine_of("bias", [[8], [2] * 4], PLAIN)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    bomb = Bomb(100)
    bomb.attach(model)
    routed = engine.step(0, samples_of()[:EACH]).routed
    bomb.remove()
    for router, load in zip(routers, routed.experts, strict=True):
        mean = sum(load.total) / 4
        moves = [0.01 * ((mean > total) - (mean < total)) for total in load.total]
        assert router.choice_bias is not None
        assert router.choice_bias.tolist() == pytest.approx(moves)
    before = [router.choice_bias.clone() for router in routers if router.choice_bias is not None]
    engine.rehearse(1, samples_of()[:EACH])
    assert all(torch.equal(r.choice_bias, b) for r, b in zip(routers, before, strict=True) if r.choice_bias is not None)


def test_loads_count_text_and_image_tokens_and_no_padding() -> None:
    engine, _ = engine_of("none", lambda choice: Cuts([[3, 3, 2]], 30), PLAIN)
    samples = samples_of()[:EACH]
    loads = engine.step(0, samples).routed.experts
    images = sum(sample.cost.image_tokens for sample in samples)
    assert [load.layer for load in loads] == [0, 1]
    for load in loads:
        assert sum(load.image) == 2 * images
        assert sum(load.total) == 2 * sum(sample.cost.tokens for sample in samples)


def test_groups_are_never_cut() -> None:
    def admit(choice: Choice) -> Admission:
        return Admission(lambda shape: 1000 * shape.samples, lambda shape: float(shape.tokens), 5000)

    engine, model = engine_of("group", admit, PLAIN)
    assert routers_of(model).group == 2
    split = engine.step(0, samples_of()[:EACH]).split
    assert split is not None
    assert sorted(position for piece in split.micro_batches for position in piece) == list(range(EACH))
    for piece in split.micro_batches:
        assert {position ^ 1 for position in piece} == set(piece)
        assert len(piece) <= 5


def test_a_group_that_does_not_fit_is_named() -> None:
    def admit(choice: Choice) -> Admission:
        return Admission(lambda shape: 1000 * shape.samples, lambda shape: 1.0, 1500)

    engine, _ = engine_of("group", admit, PLAIN)
    with pytest.raises(RunError, match=r"the 2 samples of the group of sample \d do not fit together"):
        engine.step(0, samples_of()[:EACH])
