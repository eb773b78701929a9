"""One trajectory, however a step is cut, whatever is recomputed, and wherever memory runs out.

Cuts differ in the order of sums alone: within 1e-6 of each other, relative to the norm of each parameter, after 20 steps. The
same cut gives the same bits, whether it was planned or is what a step was redone with.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from oomph.core.admission import Admission, Cost, Split
from oomph.core.layout import Shape
from oomph.live.budget import memory_limit, resident
from oomph.live.data import encoding
from oomph.live.data.collating import Collator, Prepared
from oomph.live.engine import Engine, StepResult
from oomph.live.model import build, compose_llava, part_finder
from oomph.live.optimizers import optimizer_over
from oomph.records import Choice

STEPS, EACH = 20, 8
TOLERANCE = 1e-6
PATCHES = 4
PLAIN = Choice(EACH, 1, EACH, precision="float32")
BLOCKS = replace(PLAIN, checkpointing="blocks", vision_checkpointing="blocks")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """Small products are faster on one thread, and a collection of garbage need not look at libraries."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


# Models and samples.

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def language(**settings: Any) -> LlamaConfig:
    return LlamaConfig(num_key_value_heads=1, vocab_size=128, max_position_embeddings=64, **SIZES, **settings)


@functools.cache
def model_of(images: bool, dropout: float) -> PreTrainedModel:
    """A Llama, or a LLaVA whose tower is frozen, with weights as transformers draws them. Take a copy."""
    torch.manual_seed(0)
    text = language(attention_dropout=dropout)
    if not images:
        return LlamaForCausalLM(text).train()
    config = compose_llava(CLIPVisionConfig(image_size=28, patch_size=14, **SIZES), text, -2, "patch")
    model = type(build(config, torch.float32, "sdpa"))(config)
    part = part_finder(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part(name) != "vision")
    return model.train()


@functools.cache
def samples_of(images: bool) -> list[Prepared]:
    """Of different lengths, two of three with an image, half of each without labels."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(STEPS * EACH):
        seen = int(images and number % 3 != 2)
        tokens = int(torch.randint(6, 14, (1,), generator=generator)) + PATCHES * seen
        ids = torch.randint(1, 120, (tokens,), generator=generator)
        ids[1 : 1 + PATCHES * seen] = 127
        labels = ids.clone()
        labels[: tokens // 2] = -100
        labels[ids == 127] = -100
        pictures = ({"pixel_values": torch.randn(1, 3, 28, 28, generator=generator)},) * seen
        known = encoding.Cost(0, PATCHES * seen, tokens, seen, PATCHES * seen, int((labels[1:] != -100).sum()))
        made.append(Prepared(number, f"sample {number}", ids, labels, pictures, known))
    return made


# Running.


@dataclass
class Cuts:
    """Cuts every step into micro-batches of the first sizes, and after a failure into those of the next.

    Each is padded to so many tokens at the least.
    """

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

    def shrink(self) -> None:
        raise AssertionError("a CPU has no retries")

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None: ...


@dataclass
class Bomb:
    """Raises out of memory in some of the calls of hooks: before and after a module's forward, at its output's gradient."""

    at: frozenset[int] = frozenset()
    calls: int = 0
    handles: list[Any] = field(default_factory=list)

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls - 1 in self.at:
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
    """What a run gave: losses, parameters that train, and what each step did."""

    losses: list[float]
    parameters: dict[str, Tensor]
    steps: list[StepResult]


class Run:
    """A copy of a model that is trained on the same samples as every other."""

    def __init__(self, admit: Any, choice: Choice = PLAIN, images: bool = True, dropout: float = 0.0, **settings: Any) -> None:
        source = model_of(images, dropout)
        self.model = type(source)(source.config)
        self.model.load_state_dict(source.state_dict())
        for ours, theirs in zip(self.model.parameters(), source.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        self.model.train()
        self.samples = samples_of(images)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer_over(trained, "adamw-foreach", lr=3e-4)
        admit = admit if callable(admit) else functools.partial(lambda cuts, _: cuts, Cuts(admit))
        collator = Collator(self.model.config, 127 if images else -1, 0)

        def collate(samples: Sequence[Prepared], tokens: int) -> Any:
            return collator(samples, tokens=tokens)

        self.engine: Engine[Prepared] = Engine(self.model, self.optimizer, choice, admit, collate, **settings)
        torch.manual_seed(7)

    def step(self, number: int) -> StepResult:
        return self.engine.step(number, self.samples[number * EACH : (number + 1) * EACH])

    def go(self, steps: int = STEPS, bombs: dict[int, Bomb] | None = None) -> Trajectory:
        done = []
        for number in range(steps):
            bomb = (bombs or {}).get(number, Bomb())
            bomb.attach(self.model)
            done.append(self.step(number))
            bomb.remove()
        named = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        return Trajectory([step.loss for step in done if step.loss is not None], named, done)


def assert_close(one: Trajectory, reference: Trajectory, what: str) -> None:
    """Losses and parameters agree; the mean signed difference is printed, as noise has none."""
    assert len(one.losses) == len(reference.losses) == STEPS
    assert one.losses == pytest.approx(reference.losses, rel=TOLERANCE, abs=0)
    differences = {name: one.parameters[name] - parameter for name, parameter in reference.parameters.items()}
    far = {name: float(difference.norm() / reference.parameters[name].norm()) for name, difference in differences.items()}
    signed = sum(float(d.double().sum()) for d in differences.values()) / sum(d.numel() for d in differences.values())
    losses = sum(a - b for a, b in zip(one.losses, reference.losses, strict=True)) / STEPS
    print(f"{what}: largest {max(far.values()):.1e} of a norm, mean signed {signed:+.1e}; losses {losses:+.1e}")
    assert max(far.values()) < TOLERANCE
    assert abs(signed) < 1e-9


def assert_same(one: Trajectory, reference: Trajectory) -> None:
    assert one.losses == reference.losses
    for name, parameter in reference.parameters.items():
        assert torch.equal(one.parameters[name], parameter), name


# One trajectory.


@pytest.fixture(scope="module")
def reference() -> Trajectory:
    """All samples of a step at once."""
    return Run([[8]]).go()


CASES: dict[str, Callable[[], Run]] = {
    "4 + 4": lambda: Run([[4, 4]]),
    "2 × 4": lambda: Run([[2] * 4]),
    "1 × 8": lambda: Run([[1] * 8]),
    "3 + 3 + 2": lambda: Run([[3, 3, 2]]),
    "4 + 4, padded": lambda: Run(lambda _: Cuts([[4, 4]], 24)),
    "checkpointing": lambda: Run([[8]], BLOCKS),
    "checkpointing, 3 + 3 + 2": lambda: Run([[3, 3, 2]], BLOCKS),
    "every second block": lambda: Run([[4, 4]], replace(PLAIN, checkpointing="every-2")),
    "chunked": lambda: Run([[8]], replace(PLAIN, loss="chunked")),
    "chunked, checkpointing, 1 × 8": lambda: Run([[1] * 8], replace(BLOCKS, loss="chunked")),
}


@pytest.mark.parametrize("name", CASES)
def test_every_cut_gives_one_trajectory(name: str, reference: Trajectory) -> None:
    assert_close(CASES[name]().go(), reference, name)


def test_the_comparison_finds_a_loss_that_is_weighted_wrongly(reference: Trajectory) -> None:
    run = Run([[4, 4]])
    run.samples = [replace(s, cost=s.cost._replace(label_tokens=s.cost.label_tokens + 1)) for s in run.samples]
    with pytest.raises(AssertionError):
        assert_close(run.go(), reference, "wrong")


def test_out_of_memory_in_two_steps_running(reference: Trajectory) -> None:
    bombs = {5: Bomb(frozenset({40})), 6: Bomb(frozenset({90}))}
    done = Run([[8], [4, 4], [2] * 4]).go(bombs=bombs)
    assert [len(step.recoveries) for step in done.steps] == [0] * 5 + [1, 1] + [0] * 13
    assert_close(done, reference, "done twice")


def test_shrinking_and_growing_back(reference: Trajectory) -> None:
    def admit(_: Choice) -> Admission:
        return Admission(lambda shape: 1000 * shape.samples, lambda shape: 1.0, 8000, grow_after=3)

    done = Run(admit).go(bombs={2: Bomb(frozenset({100}))})
    sizes = [max(map(len, step.split.micro_batches)) for step in done.steps if step.split]
    assert sizes[:3] == [8, 8, 4]
    assert sizes[3] == 4
    assert max(sizes[3:]) > 4, "it grows back"
    assert max(sizes[2:]) < 8, "never to what failed"
    assert_close(done, reference, "shrunk and grown")


def test_rungs_within_a_run(reference: Trajectory) -> None:
    """Step 4 fails on every cut of the first two rungs, and step 5 is back on the first."""

    def admit(choice: Choice) -> Admission:
        each = 1000 - 300 * (choice.loss == "chunked") - 400 * (choice.checkpointing == "blocks")
        return Admission(lambda shape: each * shape.samples + shape.tokens, lambda shape: 1.0, limit(), grow_after=1000)

    def limit() -> int:
        return 4500

    run = Run(admit, rungs=[replace(PLAIN, loss="chunked"), replace(BLOCKS, loss="chunked")])
    longest = [max(s.cost.tokens for s in run.samples[n * EACH : (n + 1) * EACH]) for n in range(STEPS)]
    chosen = longest.index(max(longest))
    alone = sorted(run.samples[chosen * EACH : (chosen + 1) * EACH], key=lambda s: -s.cost.tokens)[0]

    def fails_for(samples: Sequence[Prepared], tokens: int) -> Any:
        if any(sample is alone for sample in samples) and len(tried) < 4:
            tried.append(len(samples))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return collate(samples, tokens)

    tried: list[int] = []
    collate = run.engine._collate
    run.engine._collate = fails_for
    done = run.go()
    assert tried[:3] == sorted(tried[:3], reverse=True)
    assert tried[2] == 1 < tried[0]
    last = done.steps[chosen]
    assert last.choice != PLAIN
    assert last.recoveries[-1].to_choice == last.choice
    assert last.recoveries[0].from_choice == PLAIN
    assert any(step.choice == PLAIN for step in done.steps[chosen + 1 :])
    assert_close(done, reference, "other rungs")


# The same bits.


def redone(cuts: Sequence[Sequence[int]], choice: Choice, bomb: Bomb, images: bool, steps: int = 2) -> Trajectory:
    """A few steps with dropout, the first of which may fail. The random state afterwards counts as a parameter."""
    done = Run(cuts, choice, images, 0.1).go(steps, {0: bomb})
    return done._replace(parameters={**done.parameters, "random": torch.get_rng_state()})


@functools.cache
def planned(choice: Choice, images: bool, steps: int) -> Trajectory:
    """The same steps, cut into 4 + 4 from the beginning."""
    return redone([[4, 4]], choice, Bomb(), images, steps)


def sweep(choice: Choice, every: int, images: bool, steps: int = 2) -> set[str]:
    """Redoes a step after a failure in every so many-th call of a hook, and compares bits; returns the phases that failed."""
    counted = Bomb()
    redone([[8], [4, 4]], choice, counted, images, 1)
    phases = set()
    for at in range(0, counted.calls, every):
        done = redone([[8], [4, 4]], choice, Bomb(frozenset({at})), images, steps)
        (recovery,) = done.steps[0].recoveries
        assert recovery.from_split == (tuple(range(8)),)
        assert recovery.to_split == ((0, 1, 2, 3), (4, 5, 6, 7))
        assert_same(done, planned(choice, images, steps))
        phases.add(recovery.phase)
    return phases


def test_dropout_draws_something() -> None:
    assert planned(PLAIN, False, 2).losses != Run([[4, 4]], PLAIN, False).go(2).losses


@pytest.mark.parametrize("images", [False, True], ids=["llama", "llava"])
def test_a_redone_step_has_the_bits_of_a_planned_one(images: bool) -> None:
    assert sweep(BLOCKS, 23 if images else 13, images) == {"forward", "recompute", "backward"}


@pytest.mark.slow
def test_wherever_memory_runs_out_the_bits_are_the_same() -> None:
    """In every call of a hook, those in what is recomputed included: blocks, and the chunks of the loss."""
    assert sweep(replace(BLOCKS, loss="chunked"), 1, True, steps=1) == {"forward", "recompute", "backward"}


def test_a_step_fails_in_every_micro_batch_and_then_in_the_next_cut() -> None:
    counted = Bomb()
    redone([[4, 4]], PLAIN, counted, True, 1)
    half = counted.calls // 2
    done = Run([[4, 4], [3, 3, 2], [2] * 4], dropout=0.1).go(2, {0: Bomb(frozenset({half + 3, half + 3 + 60}))})
    first, second = done.steps[0].recoveries
    assert (first.micro_batch, second.from_split) == (1, first.to_split)
    assert_same(done, Run([[2] * 4], dropout=0.1).go(2))


# A limit that is kept.


DEVICE = torch.device("cpu")


def taken(cut: list[int]) -> int:
    """The most that a run takes."""
    run = Run([cut])
    with memory_limit(None, DEVICE, resident(run.model, run.optimizer)) as memory:
        run.go()
        return memory.peak_bytes


def test_a_budget_that_is_too_small_changes_the_cut_and_nothing_else(reference: Trajectory) -> None:
    """The prediction knows nothing of memory, so every run begins with a cut that does not fit."""
    least, most = taken([1] * 8), taken([8])
    for share in (0.2, 0.9):
        limit = least + int(share * (most - least))
        run = Run([[8], [4, 4], [2] * 4, [1] * 8])
        with memory_limit(limit, DEVICE, resident(run.model, run.optimizer)) as memory:
            run.engine._memory = memory
            done = run.go()
            assert memory.peak_bytes <= limit
        failed = [recovery for step in done.steps for recovery in step.recoveries]
        assert failed
        for recovery in failed:
            assert "CPU out of memory. Tried to allocate" in recovery.message
            assert recovery.measured_bytes is not None
            assert recovery.measured_bytes <= limit
        assert_close(done, reference, f"{share:.0%} of what all samples take beyond one")


def test_a_text_model_has_one_trajectory() -> None:
    assert_close(Run([[2] * 4], images=False).go(), Run([[8]], images=False).go(), "llama, 2 × 4")
