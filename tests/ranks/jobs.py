"""What runs on every rank: steps of a small LLaVA, with memory running out where it is told to."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from oomph.core.admission import Admission, Cost, Split
from oomph.core.layout import Shape
from oomph.errors import RunError
from oomph.live import engine, recover
from oomph.live.balance import apply_balance
from oomph.live.batch import images_of, random_batch
from oomph.live.data import encoding
from oomph.live.data.collating import Collator, Prepared
from oomph.live.engine import Engine, StepResult
from oomph.live.model import build, compose_llava, part_finder
from oomph.live.moe import upcycle
from oomph.live.optimizers import optimizer_over
from oomph.live.ranks import replicas, shards, torch_private
from oomph.live.ranks.apply import share
from oomph.live.ranks.group import Ranks
from oomph.live.step import LOSSES, accumulate
from oomph.recipe.schema import Balance, Experts
from oomph.records import Choice

PATCHES = 4
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB."


# Models and samples.


def model_of(tower: bool, dtype: torch.dtype = torch.float32, experts: bool = False) -> PreTrainedModel:
    """A small LLaVA, the same on every rank; its FFNs may be mixtures of balanced experts."""
    torch.manual_seed(0)
    text = LlamaConfig(num_key_value_heads=1, vocab_size=128, max_position_embeddings=64, **SIZES)
    config = compose_llava(CLIPVisionConfig(image_size=28, patch_size=14, **SIZES), text, -2, "patch")
    model = type(build(config, torch.float32, "sdpa"))(config).to(dtype)
    if experts:
        upcycle(model, Experts(count=4, top_k=2, layers="all", noise=0.5))
        apply_balance(model, Balance(kind="sequence", coefficient=0.1, z_loss=0.01))
    part = part_finder(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tower or part(name) != "vision")
    return model.train()


def samples_of(number: int, images: bool = True) -> list[Prepared]:
    """Two of three with an image, the others longer; half of each without labels."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(number):
        seen = int(images and index % 3 != 2)
        tokens = int(torch.randint(6, 14, (1,), generator=generator)) + (PATCHES if seen else 10)
        ids = torch.randint(1, 120, (tokens,), generator=generator)
        ids[1 : 1 + PATCHES * seen] = 127
        labels = ids.clone()
        labels[: tokens // 2] = -100
        labels[ids == 127] = -100
        pictures = ({"pixel_values": torch.randn(1, 3, 28, 28, generator=generator)},) * seen
        known = encoding.Cost(0, PATCHES * seen, tokens, seen, PATCHES * seen, int((labels[1:] != -100).sum()))
        made.append(Prepared(index, f"sample {index}", ids, labels, pictures, known))
    return made


@dataclass
class Cuts:
    """Micro-batches of up to so many samples; of one after a failure."""

    most: int = 2
    limit_bytes: int = 0
    told: Callable[[], None] = lambda: None

    def split(self, costs: Sequence[Cost]) -> Split:
        pieces = [tuple(range(at, min(at + self.most, len(costs)))) for at in range(0, len(costs), self.most)]
        shapes = tuple(Shape(len(p), max(costs[at].tokens for at in p), sum(costs[at].images for at in p)) for p in pieces)
        return Split(tuple(pieces), shapes, tuple(map(len, pieces)), float(sum(s.samples * s.tokens for s in shapes)))

    def failed(self, split: Split, micro_batch: int) -> None:
        self.most = 1
        self.told()

    def committed(self) -> None: ...

    def shrink(self) -> None: ...

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None: ...


# Faults.


@dataclass
class Bomb:
    """Raises out of memory in one of the calls of hooks.

    These are before and after a module's forward, at its output's gradient, and where FSDP2 takes a buffer.
    """

    at: int = -1
    calls: int = 0
    error: Callable[[], Exception] = field(default=lambda: torch.OutOfMemoryError(OOM))

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise self.error()

    def arm(self, at: int) -> None:
        self.at, self.calls = at, 0

    def disarm(self) -> None:
        self.at = -1

    def attach(self, model: nn.Module) -> None:
        for module in model.modules():
            module.register_forward_pre_hook(self)
            module.register_forward_hook(self._after)

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self)

    @contextmanager
    def in_buffers(self) -> Iterator[None]:
        before = _fsdp_collectives.DefaultAllocMixin.allocate

        def allocate(comm: Any, *args: Any, **kwargs: Any) -> Any:
            self()
            return before(comm, *args, **kwargs)

        _fsdp_collectives.DefaultAllocMixin.allocate = allocate
        yield
        _fsdp_collectives.DefaultAllocMixin.allocate = before


# Running.


class Run:
    """A model that is shared by the ranks, and its engine."""

    def __init__(
        self, ranks: Ranks, sharding: str, samples: int, tower: bool, knobs: dict[str, Any], dtype: torch.dtype = torch.float32
    ) -> None:
        knobs = {"precision": "float32"} | knobs
        experts = knobs.pop("experts", False)
        sharding = "none" if ranks.size == 1 else sharding
        self.choice = replace(Choice(2, 1, samples, gpus=ranks.size), sharding=sharding, **knobs)
        self.ranks, self.model, self.cuts = ranks, model_of(tower, dtype, experts), Cuts()
        self.parallel = share(self.model, self.choice, ranks)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer_over(trained, "adamw-foreach", master_weights=self.choice.master_weights, lr=3e-4)
        self.samples = samples_of(samples)
        collator, pixels = Collator(self.model.config, 127, 0), dtype

        def collate(chosen: Sequence[Prepared], tokens: int) -> Any:
            return collator(chosen, pixels, tokens)

        self.collate = collate
        self.engine: Engine[Prepared] = Engine(
            self.model, self.optimizer, self.choice, lambda _: self.cuts, collate, parallel=self.parallel
        )

    def gradients(self) -> tuple[StepResult, dict[str, Tensor]]:
        """What one step would update with, without doing so."""
        found: dict[str, Tensor] = {}

        def commit(_: int) -> None:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    found[name] = own(parameter.grad).clone()
                parameter.grad = None

        self.engine._commit = commit  # type: ignore[method-assign]
        return self.engine.step(0, self.samples), found


def whole(tensor: Any) -> Tensor:
    """All of a tensor, wherever its chunks are."""
    local: Tensor = tensor.detach()
    return local.full_tensor() if hasattr(local, "full_tensor") else local


def own(tensor: Any) -> Tensor:
    """What this rank has of a tensor."""
    local: Tensor = tensor.detach()
    return local.to_local() if hasattr(local, "to_local") else local


def error_of(ranks: Ranks, found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, relative to the norm of all of them; infinite where some are missing."""
    if found.keys() != reference.keys():
        return float("inf")
    squares = [float((found[name] - gradient).double().square().sum()) for name, gradient in reference.items()]
    squares.append(sum(float(gradient.double().square().sum()) for gradient in reference.values()))
    *differences, scale = ranks.sums(squares)
    return float((max(differences) / scale) ** 0.5)


def same_bits(ranks: Ranks, found: dict[str, Tensor], planned: dict[str, Tensor]) -> bool:
    """Whether all gradients on all ranks are equal."""
    (differ,) = ranks.most([int(not all(torch.equal(found[name], gradient) for name, gradient in planned.items()))])
    return not differ


def subsets(size: int) -> list[tuple[int, ...]]:
    return [chosen for count in range(1, size + 1) for chosen in itertools.combinations(range(size), count)]


def sweep(
    ranks: Ranks, sharding: str, every: int = 1, samples: int = 9, tower: bool = True, clears: bool = True, **knobs: Any
) -> dict[str, Any]:
    """Memory runs out on every subset of ranks, at every so many-th call of a hook; the step is redone with smaller ones.

    The first of those calls is drawn for each subset. Gradients are compared with those of a step that ran clean, and, bit by
    bit, with those of a step that was cut small from the beginning.
    """
    if not clears:
        shards.drop_partial = lambda model: None
        recover.drop_gradients = lambda model: None
    dtype = torch.bfloat16 if knobs.get("master_weights") else torch.float32
    run, bomb = Run(ranks, sharding, samples, tower, knobs, dtype), Bomb()
    run.cuts.most = 1
    _, planned = run.gradients()
    bomb.attach(run.model)
    run.cuts.told = bomb.disarm
    result: dict[str, Any] = {"faults": 0, "worst": 0.0, "norm": 0.0, "same_bits": 0, "phases": {}, "micro_batches": []}
    with bomb.in_buffers():
        run.cuts.most, bomb.calls = 2, 0
        clean, reference = run.gradients()
        result["calls"] = max(ranks.exchange(bomb.calls))
        generator = random.Random(0)
        for chosen in subsets(ranks.size):
            for at in range(generator.randrange(every), result["calls"], every):
                run.cuts.most = 2
                bomb.arm(at if ranks.rank in chosen else -1)
                done, found = run.gradients()
                if done.recoveries:
                    note(result, done, clean)
                    result["worst"] = max(result["worst"], error_of(ranks, found, reference))
                    result["same_bits"] += same_bits(ranks, found, planned)
    if isinstance(run.parallel, shards.Shards):
        assert None not in run.parallel._schedules.values(), "all micro-batches issue the same collectives"
    return result


def note(result: dict[str, Any], done: StepResult, clean: StepResult) -> None:
    assert clean.grad_norm is not None
    assert done.grad_norm is not None
    result["faults"] += 1
    result["norm"] = max(result["norm"], abs(done.grad_norm / clean.grad_norm - 1))
    (recovery,) = done.recoveries
    result["phases"][recovery.phase] = result["phases"].get(recovery.phase, 0) + 1
    result["micro_batches"] = sorted({*result["micro_batches"], recovery.micro_batch})


def trajectory(ranks: Ranks, sharding: str, path: str, steps: int = 3, bucket: int = 0, **knobs: Any) -> list[float]:
    """A few steps, in the second and third of which memory runs out on one rank; the parameters are saved.

    On four ranks some have a text alone, and so no gradient of the projector.
    """
    if bucket:
        replicas.BUCKET_BYTES = bucket
    run, bomb = Run(ranks, sharding, 5, False, knobs), Bomb()
    bomb.attach(run.model)
    run.cuts.told = bomb.disarm
    losses = []
    for step in range(steps):
        run.cuts.most = 2
        bomb.arm({1: 40, 2: 90}.get(step, -1) if ranks.rank == ranks.size - 1 else -1)
        done = run.engine.step(step, run.samples)
        assert len(done.recoveries) == (step in (1, 2)), "memory ran out where it was told to"
        assert done.loss is not None
        losses.append(done.loss)
    parameters = {name: whole(parameter) for name, parameter in run.model.named_parameters()}
    if ranks.rank == 0:
        torch.save(parameters, path)
    return losses


def changes_rung(ranks: Ranks, sharding: str) -> list[Any]:
    """Memory runs out on rank 0 in micro-batches of two and of one; the next rung recomputes, and the step after is back."""

    def admit(choice: Choice) -> Admission:
        each = 10 if choice.checkpointing == "none" else 1
        return Admission(lambda shape: each * shape.samples, lambda shape: 1.0, 20)

    run, bomb = Run(ranks, sharding, 8, True, {}), Bomb()
    run.engine._admit = admit
    run.engine._rungs = (run.choice, replace(run.choice, checkpointing="blocks", loss="chunked"))
    run.engine.rehearse(0, run.samples)
    _, reference = run.gradients()
    bomb.attach(run.model)
    calls = []

    def fails_twice() -> None:
        calls.append(1)
        bomb.arm(60 if ranks.rank == 0 and len(calls) < 2 else -1)

    run.engine._snapshot.restore = _and_then(run.engine._snapshot.restore, fails_twice)  # type: ignore[method-assign]
    bomb.arm(30 if ranks.rank == 0 else -1)
    done, found = run.gradients()
    again = run.engine.rehearse(0, run.samples)
    rungs = [recovery.to_choice.checkpointing for recovery in done.recoveries]
    return [error_of(ranks, found, reference), rungs, done.choice.loss, again.choice.loss]


def _and_then(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def config_of(kind: str) -> Any:
    """Small models of the kinds whose towers and language models meet in different ways."""
    text = SIZES | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 520, "head_dim": 8}
    ids = {"image_token_id": 6, "video_token_id": 500, "vision_start_token_id": 5, "vision_end_token_id": 7}
    tower: dict[str, Any] = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
    tower |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}}
    if kind == "qwen3_vl":
        tower |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        return Qwen3VLConfig(text_config=text, vision_config=tower, **ids)
    if kind == "qwen2_5_vl":
        tower |= {"window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids)
    assert kind == "gemma3"
    del text["rope_parameters"]
    siglip = {"image_size": 16, "patch_size": 4} | SIZES
    return Gemma3Config(text_config=text, vision_config=siglip, mm_tokens_per_image=4, image_token_index=500)


def collectives(ranks: Ranks, kind: str, tower: bool) -> list[list[list[Any]]]:
    """What a micro-batch with an image issues, and one without."""
    torch.manual_seed(0)
    config: Any = model_of(True).config if kind == "llava" else config_of(kind)
    model = type(build(config, torch.float32, "sdpa"))(config).train()
    part = part_finder(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tower or part(name) != "vision")
    parallel: Any = share(model, Choice(1, 1, 2, gpus=ranks.size, sharding="fsdp2", precision="float32"), ranks)
    images, found = images_of(config, (16, 16)), []
    assert images is not None
    for seen in (1, 0):
        batch = random_batch(config, Shape(1, images.tokens + 5, seen), images if seen else None, torch.float32)
        parallel.begin(str(seen), learns=True)
        accumulate(model, [lambda batch=batch: batch], parallel.loss(LOSSES["full"]), 7)
        parallel.end()
        parallel.reset()
        found.append([[call.kind, call.given, call.got] for call in parallel._schedules[str(seen)]])
    return found


def breaks(ranks: Ranks, sharding: str, where: str) -> list[str]:
    """Something goes wrong on the last rank, at the beginning or in step 1; what each rank says of it."""
    last = ranks.rank == ranks.size - 1
    if where == "states" and last:
        engine.materialise = _once_out_of_memory(engine.materialise)
    try:
        run, bomb = Run(ranks, sharding, 8, False, {}), Bomb(error=lambda: ValueError("ours\nand more"))
    except RunError as error:
        return [type(error).__name__, str(error)]
    run.engine.step(0, run.samples)
    if where == "forward":
        bomb.attach(run.model)
        bomb.arm(60 if last else -1)
    elif where == "clip" and last:
        run.parallel.ready = _once_out_of_memory(run.parallel.ready)  # type: ignore[method-assign]
    elif where == "update" and last:
        run.optimizer.step = _once_out_of_memory(run.optimizer.step)  # type: ignore[method-assign]
    try:
        done = run.engine.step(1, run.samples)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return [recovery.message for recovery in done.recoveries] + [recovery.phase for recovery in done.recoveries]


def _once_out_of_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    done = []

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not done:
            done.append(1)
            raise torch.OutOfMemoryError(OOM)
        return result

    return call


def stale(ranks: Ranks) -> list[int]:
    """Whole gradients left: after memory ran out in a backward, after PyTorch's reset with ``zero_grad``, and after ours."""
    run, bomb = Run(ranks, "fsdp2", 8, False, {}), Bomb()
    run.engine.step(0, run.samples)
    hook = run.model.lm_head.register_forward_pre_hook(bomb)
    head = run.model.model.language_model.layers[-1].mlp.gate_proj
    handle = head.register_forward_hook(lambda module, inputs, output: output.register_hook(bomb) and None)
    batch = run.collate(run.samples[:2], 0)
    loss = run.parallel.loss(LOSSES["full"])(run.model, batch, 7)
    bomb.arm(0)
    try:
        loss.backward()
    except torch.OutOfMemoryError:
        pass
    hook.remove()
    handle.remove()
    found = [torch_private.partial_gradients(run.model)]
    root: Any = run.model
    root.reset_iter_state()
    run.optimizer.zero_grad()
    run.model.zero_grad()
    found.append(torch_private.partial_gradients(run.model))
    run.parallel.reset()
    return [*found, torch_private.partial_gradients(run.model)]


def talk(ranks: Ranks) -> list[Any]:
    """What ranks tell each other."""
    rank = ranks.rank
    return [ranks.sums([rank, 0.25]), ranks.most([rank, -rank]), ranks.exchange(str(rank)), ranks.broadcast(str(rank), 1)]
