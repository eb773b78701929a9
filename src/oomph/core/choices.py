"""From a recipe's knobs to a definite `Choice`, with the reason of every value in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from oomph.core.eight_bit import EIGHT_BIT
from oomph.errors import UserError
from oomph.recipe import Data, Hardware, Memory, Recipe, Stage, memory_of
from oomph.records import Choice

# The first with bfloat16 arithmetic (CUDA C++ Programming Guide, "Compute Capabilities"), and the first that
# FlashAttention-2's kernels are built for (Dao-AILab/flash-attention, README).
_AMPERE = (8, 0)


class GpuLike(Protocol):
    """The facts about a GPU that a choice depends on."""

    @property
    def name(self) -> str:
        """The card's name."""
        ...

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """CUDA's (major, minor) of the card; None for one that is not CUDA's."""
        ...


def resolve(
    stage: Stage, recipe: Recipe, gpu: GpuLike, fits: Callable[[Choice], bool] | None = None
) -> tuple[Choice, dict[str, str]]:
    """Every knob of the stage with one value, and why it has that value.

    Args:
        stage: one of the recipe's stages.
        recipe: the recipe, for the hardware and the knobs that the stage does not set.
        gpu: the card that the recipe names.
        fits: whether a choice fits on the card. With it, `auto` for the micro-batch is the largest that does; without
            it, the largest there is.

    Returns:
        The choice, and a sentence for each of its fields and for ``samples_per_gpu`` and ``last_micro_batch``.

    Raises:
        UserError: pinned knobs exclude each other or the card, or the GPUs cannot share the effective batch.
    """
    memory, gpus = memory_of(recipe, stage), recipe.hardware.gpus
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for knob, (automatic, reason) in _automatic(gpu.name, _capability(gpu), gpus).items():
        given = getattr(memory, knob)
        values[knob] = automatic if given == "auto" else given
        reasons[knob] = reason if given == "auto" else _pinned(stage, knob)
    _follow(values, reasons, memory)
    pinned = None if memory.micro_batch == "auto" else memory.micro_batch
    exact = values["sharding"].startswith("zero")
    problems = clashes(values, gpu, recipe.hardware)
    sharing = _unshareable(stage.effective_batch, gpus, pinned, exact)
    if problems or sharing:
        hint = _way_out(stage, gpus, exact) if sharing else "`auto` leaves a knob to the planner"
        raise UserError([f"stage {stage.name}: {problem}" for problem in [*problems, *sharing]], hint)

    def choice_of(micro_batch: int) -> Choice:
        return Choice(
            micro_batch=micro_batch,
            accumulation=_ceil(_most(stage.effective_batch, gpus), micro_batch),
            effective_batch=stage.effective_batch,
            gpus=gpus,
            nodes=recipe.hardware.nodes,
            eval_batch=_eval_batch(memory.eval_batch, micro_batch),
            **values,
        )

    if pinned is None:
        possible = _possible(stage.effective_batch, gpus, exact)
        choice, reasons["micro_batch"] = _largest([choice_of(micro_batch) for micro_batch in possible], fits, gpu)
    else:
        choice, reasons["micro_batch"] = choice_of(pinned), _pinned(stage, "micro_batch")
    return choice, reasons | _derived(choice, stage, memory.eval_batch)


def reasons_for(choice: Choice, stage: Stage, recipe: Recipe, gpu: GpuLike) -> dict[str, str]:
    """The sentences of `resolve` for a choice that a search has found."""
    memory = memory_of(recipe, stage)
    resolved, reasons = resolve(stage, recipe, gpu)
    for knob in type(memory).model_fields:
        free = getattr(memory, knob) == "auto" and knob != "eval_batch"
        if free and (knob == "micro_batch" or getattr(choice, knob) != getattr(resolved, knob)):
            reasons[knob] = "the fastest configuration that fits has it"
    return reasons | _derived(choice, stage, memory.eval_batch)


def micro_batch_candidates(per_gpu_samples: int) -> list[int]:
    """The micro-batches of every distinct cut of ``per_gpu_samples``, largest first: ceil(samples / accumulation)."""
    found: list[int] = []
    micro_batch = per_gpu_samples
    while micro_batch >= 1:
        found.append(micro_batch)
        # The next smaller ceil(n / a) belongs to the smallest a with a · (m - 1) >= n.
        micro_batch = _ceil(per_gpu_samples, _ceil(per_gpu_samples, micro_batch - 1)) if micro_batch > 1 else 0
    return found


def cuts(choice: Choice, sharding: str, every: bool = False) -> list[int]:
    """The micro-batches into which a choice's effective batch can be cut under a sharding, largest first.

    Args:
        choice: for the effective batch and the GPUs.
        sharding: ZeRO in DeepSpeed takes micro-batches of one size alone.
        every: also those that take as many steps as a smaller one does.
    """
    return _possible(choice.effective_batch, choice.gpus, sharding.startswith("zero"), every)


def with_micro_batch(choice: Choice, micro_batch: int, eval_batch: int | str) -> Choice:
    """The choice with its batch cut otherwise; `eval_batch` is what the recipe says of it."""
    most = _most(choice.effective_batch, choice.gpus)
    evaluated = micro_batch if eval_batch == "auto" else choice.eval_batch
    return replace(choice, micro_batch=micro_batch, accumulation=_ceil(most, micro_batch), eval_batch=evaluated)


def micro_batch_sizes(choice: Choice) -> tuple[tuple[int, ...], ...]:
    """Samples of each micro-batch of one optimizer step, GPU by GPU.

    The first GPUs take one sample more where the batch cannot be shared evenly. A GPU fills its micro-batches from the
    first on and leaves at least one sample for each that follows, so all GPUs have the same number of them.
    """
    share, more = divmod(choice.effective_batch, choice.gpus)
    return tuple(_cut(share + (rank < more), choice) for rank in range(choice.gpus))


def sample_tokens(data: Data, tokens_per_image: int) -> int:
    """The tokens of the longest sample, as the language model sees it.

    Where image tokens do not count, each image is one token while the text is cut to `max_tokens`, and
    ``tokens_per_image`` of them take its place afterwards.

    Args:
        data: the stage's limits.
        tokens_per_image: tokens that the model makes of one image; 0 for a model that sees none.

    Raises:
        UserError: the images alone are more than `max_tokens`.
    """
    images = data.images_per_sample if tokens_per_image else 0
    counted = images * (tokens_per_image if data.image_tokens_count else 1)
    if counted > data.max_tokens:
        each = f" of {tokens_per_image} tokens each" if data.image_tokens_count else ", one token each before the splice,"
        raise UserError(
            f"data.images_per_sample {images}{each} do not fit into data.max_tokens {data.max_tokens}",
            f"allow at least {counted} tokens, or fewer images",
        )
    return data.max_tokens if data.image_tokens_count else data.max_tokens + images * (tokens_per_image - 1)


def _capability(gpu: GpuLike) -> tuple[int, int]:
    if gpu.compute_capability is None:
        raise UserError(f"hardware.gpu {gpu.name} is no CUDA card, and the memory of no other kind is known here")
    return gpu.compute_capability


def _automatic(gpu: str, capability: tuple[int, int], gpus: int) -> dict[str, tuple[Any, str]]:
    """The value of each knob that is left to us, and why."""
    card = f"{gpu} has compute capability {capability[0]}.{capability[1]}"
    if capability >= _AMPERE:
        precision = ("bfloat16", f"{card}, and 8.0 and later compute in bfloat16")
    else:
        precision = ("float32", f"{card}, and bfloat16 needs 8.0")
    several = ("ddp", f"{gpus} GPUs, each with the whole model")
    return {
        "checkpointing": ("blocks", "recomputing each block in backward gives the same gradients with little memory"),
        "vision_checkpointing": ("blocks", "the vision tower as the language model"),
        "attention": ("sdpa", "the fused kernels that PyTorch picks keep no scores"),
        "loss": ("chunked", "the same loss without keeping the logits of all tokens"),
        "precision": precision,
        "optimizer": ("adamw-fused", "one kernel that makes no temporary copies"),
        "optimizer_offload": (False, "the states of the optimizer stay on the GPU"),
        "sharding": several if gpus > 1 else ("none", "one GPU has nobody to share with"),
        "master_weights": (False, "the optimizer updates the weights themselves"),
        "expandable_segments": (False, "PyTorch's default"),
    }


def _pinned(stage: Stage, knob: str) -> str:
    section = f"stages.{stage.name}.memory" if knob in stage.memory.model_fields_set else "memory"
    return f"pinned by {section}.{knob}"


def _follow(values: dict[str, Any], reasons: dict[str, str], memory: Memory) -> None:
    """Knobs left to us that follow from others, in place."""
    zero = values["sharding"].startswith("zero") and values["precision"] == "bfloat16"
    if memory.master_weights == "auto" and zero:
        values["master_weights"], reasons["master_weights"] = True, f"sharding {values['sharding']} always has them"
    if memory.vision_checkpointing == "auto" and values["checkpointing"] == "none":
        values["vision_checkpointing"] = "none"


def clashes(values: dict[str, Any], gpu: GpuLike, hardware: Hardware) -> list[str]:
    """A sentence for every two settings that exclude each other; none where the knobs can stand together.

    Args:
        values: every memory knob but the batch sizes.
        gpu: the card.
        hardware: how many of them, on how many machines.
    """
    capability = _capability(gpu)
    attention, precision = values["attention"], values["precision"]
    old = f"hardware.gpu {gpu.name}: its compute capability is {capability[0]}.{capability[1]}, and 8.0 is needed"
    problems = _sharding_clashes(values["sharding"], hardware) + _state_clashes(values) + _precision_clashes(values)
    if capability < _AMPERE:
        if precision.startswith("bfloat16"):
            problems.append(f"precision {precision} is not possible with {old}")
        if attention == "flash":
            problems.append(f"attention flash is not possible with {old}")
    elif attention == "flash" and precision == "float32":
        problems.append("attention flash is not possible with precision float32: its kernels take 16-bit numbers alone")
    return problems


def _sharding_clashes(sharding: str, hardware: Hardware) -> list[str]:
    gpus, nodes = hardware.gpus, hardware.nodes
    if sharding == "none":
        several = f"sharding none is not possible with hardware.gpus {gpus}: several GPUs take ddp, zero1 to zero3 or fsdp2"
        return [several] if gpus > 1 else []
    if gpus == 1:
        return [f"sharding {sharding} is not possible with hardware.gpus 1: it takes several GPUs"]
    if sharding == "fsdp2-hybrid" and nodes == 1:
        return ["sharding fsdp2-hybrid is not possible with hardware.nodes 1: it divides within a node, over several"]
    if sharding == "fsdp2-hybrid" and nodes == gpus:
        return [f"sharding fsdp2-hybrid is not possible with hardware.nodes {nodes} for {gpus} GPUs: it takes several a node"]
    return []


def _state_clashes(values: dict[str, Any]) -> list[str]:
    """Settings of the optimizer that its sharding or the precision excludes."""
    sharding, problems = values["sharding"], []
    if not values["master_weights"] and values["precision"] == "bfloat16" and sharding.startswith("zero"):
        problems.append(f"master_weights false is not possible with sharding {sharding}: DeepSpeed always holds float32 copies")
    if values["optimizer_offload"] and sharding.startswith("zero"):
        problems.append(f"optimizer_offload true is not possible with sharding {sharding}: DeepSpeed's offload is not laid out")
    return problems + _eight_bit_clashes(values)


def _precision_clashes(values: dict[str, Any]) -> list[str]:
    """Settings that a precision excludes on every card."""
    precision, sharding, problems = values["precision"], values["sharding"], []
    mixed, refused = precision.endswith("-mixed"), f"precision {precision} is not possible with sharding {sharding}"
    if mixed and values["master_weights"]:
        why = "the weights that it trains are float32 themselves"
        problems.append(f"master_weights true is not possible with precision {precision}: {why}")
    if mixed and sharding.startswith("zero"):
        problems.append(f"{refused}: DeepSpeed has a mixed precision of its own, which is precision bfloat16")
    elif mixed and sharding.startswith("fsdp2"):
        own = "which is precision bfloat16 with master_weights true"
        problems.append(f"{refused}: FSDP2 has a mixed precision of its own, {own}")
    elif precision == "float16" and sharding.startswith("zero"):
        problems.append(f"{refused}: DeepSpeed scales the loss of float16 models, and how it does so is not laid out")
    return problems


def _eight_bit_clashes(values: dict[str, Any]) -> list[str]:
    """Settings that an optimizer of bitsandbytes excludes."""
    optimizer, sharding, problems = values["optimizer"], values["sharding"], []
    if optimizer not in EIGHT_BIT:
        return []
    if sharding.startswith("zero"):
        why = "DeepSpeed's step with an optimizer that is not its own is not laid out"
        problems.append(f"optimizer {optimizer} is not possible with sharding {sharding}: {why}")
    elif sharding.startswith("fsdp2"):
        why = "bitsandbytes updates whole tensors, and FSDP2 leaves each GPU parts of them"
        problems.append(f"optimizer {optimizer} is not possible with sharding {sharding}: {why}")
    elif values["master_weights"]:
        why = "bitsandbytes has no float32 copies and updates the weights themselves"
        problems.append(f"master_weights true is not possible with optimizer {optimizer}: {why}")
    if values["optimizer_offload"]:
        why = "in host memory torch's AdamW runs, whose states have 32 bits or the weights' own"
        problems.append(f"optimizer_offload true is not possible with optimizer {optimizer}: {why}")
    return problems


def _unshareable(batch: int, gpus: int, micro_batch: int | None, exact: bool) -> list[str]:
    """Why the GPUs cannot share an effective batch, with the nearest ones that they can; nothing where they can."""
    share = _most(batch, gpus)
    if batch < gpus:
        return [f"effective_batch {batch} leaves some of the {gpus} GPUs without a sample; the nearest that does not is {gpus}"]
    if micro_batch is not None and micro_batch > share:
        return [f"micro_batch {micro_batch} is larger than the {share} samples that a GPU gets of effective_batch {batch}"]
    if _cuttable(batch, gpus, micro_batch or 1, exact) or (micro_batch is None and not exact):
        return []
    step = gpus * (micro_batch or 1) if exact else gpus
    below, above = batch // step * step, (batch // step + 1) * step
    nearest = f"the nearest that can are {below} and {above}" if below else f"the nearest that can is {above}"
    if not exact:
        return [f"effective_batch {batch} cannot be cut into as many micro-batches of 1 on each of {gpus} GPUs; {nearest}"]
    pieces = f"micro-batches of {micro_batch}" if micro_batch else "equal shares"
    return [f"effective_batch {batch} cannot be cut into {pieces} alone on {gpus} GPUs, as ZeRO in DeepSpeed needs; {nearest}"]


def _way_out(stage: Stage, gpus: int, exact: bool) -> str:
    possible = _possible(stage.effective_batch, gpus, exact)
    if not possible:
        return ""
    listed = ", ".join(map(str, possible[:8])) + (" ..." if len(possible) > 8 else "")
    return f"with effective_batch {stage.effective_batch}, micro_batch may be {listed}; `auto` leaves any knob to the planner"


def _possible(batch: int, gpus: int, exact: bool, every: bool = False) -> list[int]:
    most = _most(batch, gpus)
    candidates = range(most, 0, -1) if every else micro_batch_candidates(most)
    return [micro_batch for micro_batch in candidates if _cuttable(batch, gpus, micro_batch, exact)]


def _cuttable(batch: int, gpus: int, micro_batch: int, exact: bool) -> bool:
    """Whether every GPU can cut its share into the same number of micro-batches, none of them empty.

    DeepSpeed asserts train_batch_size == micro_batch * accumulation * world_size (deepspeed/runtime/config.py).
    """
    if exact:
        return batch % (micro_batch * gpus) == 0
    return micro_batch <= _most(batch, gpus) and _ceil(_most(batch, gpus), micro_batch) <= batch // gpus


def _largest(choices: list[Choice], fits: Callable[[Choice], bool] | None, gpu: GpuLike) -> tuple[Choice, str]:
    """The first choice that fits, largest micro-batch first; where none does, the last."""
    if fits is None:
        return choices[0], "the largest cut of a GPU's samples; whether it fits was not asked"
    for before, choice in zip([None, *choices], choices, strict=False):
        if fits(choice):
            why = f"{before.micro_batch} does not fit on {gpu.name}" if before else "all samples of a GPU at once"
            return choice, f"the largest cut that fits: {why}"
    return choices[-1], f"the smallest cut; not even this one fits on {gpu.name}"


def _derived(choice: Choice, stage: Stage, eval_batch: int | str) -> dict[str, str]:
    """The reasons of the numbers that no knob gives."""
    batch, gpus, micro_batch = choice.effective_batch, choice.gpus, choice.micro_batch
    most, more = _most(batch, gpus), batch % gpus
    shares = f"{most} on {more} of them and {most - 1} on the others" if more else f"{most} on each"
    last = most - (choice.accumulation - 1) * micro_batch
    ragged = "" if last == micro_batch else f", ragged: the others have {micro_batch}"
    evaluation = {"auto": "as the micro-batch; evaluation keeps no graph", "none": "the run does not evaluate"}
    return {
        "effective_batch": f"given by stages.{stage.name}.effective_batch",
        "gpus": "given by hardware.gpus",
        "nodes": "given by hardware.nodes",
        "samples_per_gpu": f"{batch} samples over {gpus} GPU{'s' if gpus > 1 else ''}: {shares}",
        "accumulation": f"{most} samples of a GPU, {micro_batch} at a time, make {choice.accumulation}",
        "last_micro_batch": f"{last} sample{'s' if last > 1 else ''}" + ragged,
        "eval_batch": evaluation.get(str(eval_batch), _pinned(stage, "eval_batch")),
    }


def _eval_batch(given: int | str, micro_batch: int) -> int | None:
    if given == "none":
        return None
    return given if isinstance(given, int) else micro_batch


def _cut(samples: int, choice: Choice) -> tuple[int, ...]:
    sizes = []
    for following in reversed(range(choice.accumulation)):
        sizes.append(min(choice.micro_batch, samples - following))
        samples -= sizes[-1]
    return tuple(sizes)


def _most(batch: int, gpus: int) -> int:
    """The samples of the GPU that has most of them."""
    return _ceil(batch, gpus)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
