"""The words of the reports: operators, element types, roles and phases as a researcher calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import groupby

from oomph.records import Choice, FailingRequest, Prediction, Request, Speed, StagePlan
from oomph.report.lines import clean, kept
from oomph.units import count, size

_OPERATORS = {
    "_grouped_mm": "grouped matrix product",
    "_scaled_dot_product_efficient_attention": "efficient attention",
    "_scaled_dot_product_efficient_attention_backward": "efficient attention backward",
    "_scaled_dot_product_flash_attention": "flash attention",
    "_scaled_dot_product_flash_attention_backward": "flash attention backward",
    "_to_copy": "cast",
    "addmm": "matrix product",
    "baddbmm": "matrix product",
    "bmm": "matrix product",
    "cat": "concatenation",
    "clone": "copy",
    "embedding_dense_backward": "embedding backward",
    "mm": "matrix product",
    "nll_loss_backward": "loss backward",
    "nll_loss_forward": "loss",
}
_LIBRARIES = {"zero": "ZeRO", "ddp": "DDP", "fsdp2": "FSDP2"}
_DTYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_OUTSIDE = {"context": "CUDA context", "nccl": "NCCL"}
_ROLES = {
    "weight": ("weights", "a weight"),
    "gradient": ("gradients", "a gradient"),
    "optimizer": ("optimizer state", "optimizer state"),
    "activation": ("activations", "an activation"),
    "scores": ("attention scores", "attention scores"),
    "logits": ("logits", "logits"),
    "dispatch": ("dispatch to experts", "a tensor of the dispatch to experts"),
    "input": ("inputs", "an input"),
    "temporary": ("temporaries", "a temporary"),
    "workspace": ("library workspaces", "a library workspace"),
    "communication": ("communication buffers", "a communication buffer"),
}
_PHASES = {
    "load": "loading the model",
    "forward": "the forward pass",
    "recompute": "the recomputed forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer step",
    "evaluate": "the evaluation",
}
_FOLLOWING = ("accumulation", "effective_batch", "gpus", "nodes")
_LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)(?:\.|$)")


def operator(op: str) -> str:
    """An operator's name for people: ``aten._softmax_backward_data.default:tmp`` is ``softmax backward, temporary``."""
    path, colon, hidden = clean(op).partition(":")
    parts = path.split(".")
    if path == "load":
        name = "weights"
    elif len(parts) == 2 and parts[0] in _LIBRARIES:
        name = f"{_LIBRARIES[parts[0]]} {parts[1].replace('_', ' ')}"
    elif len(parts) == 3:
        bare = parts[1].strip("_").removeprefix("native_").removesuffix("_data")
        name = _OPERATORS.get(parts[1], bare.replace("_", " "))
    else:
        name = path.replace("cublas", "cuBLAS")
    return f"{name}, {'temporary' if hidden == 'tmp' else hidden.replace('_', ' ')}" if colon else name


def dtype(name: str) -> str:
    """An element type: ``bf16``."""
    return _DTYPES.get(name, clean(name))


def shape(dimensions: tuple[int, ...]) -> str:
    """Elements per dimension: ``[8, 32, 2623, 2623]``."""
    return f"[{', '.join(map(str, dimensions))}]"


def roles(role: str) -> str:
    """What all storages of a role are called: ``activations``."""
    return _ROLES[role][0] if role in _ROLES else clean(role)


def outside(name: str) -> str:
    """A consumer of memory outside the allocator: ``CUDA context``, ``NCCL, measured on this machine``."""
    what, comma, how = name.partition(",")
    return f"{_OUTSIDE.get(what, clean(what))}{comma}{clean(how)}"


def knob(name: str, value: object) -> str:
    """One memory knob with its value: ``micro-batch 8``."""
    return f"{label(name)} {'on' if value is True else 'off' if value is False else 'none' if value is None else value}"


def label(name: str) -> str:
    """A field's name in words: ``last micro-batch``."""
    return clean(name).replace("micro_batch", "micro-batch").replace("_", " ").replace("per gpu", "per GPU")


def is_pinned(reason: str) -> bool:
    """Whether a value's reason is that the recipe pins the knob."""
    return reason.startswith("pinned by ")


def is_given(reason: str) -> bool:
    """Whether a value's reason is that the recipe gives it."""
    return reason.startswith(("pinned by ", "given by "))


def needed_bytes(prediction: Prediction) -> tuple[int, int]:
    """The most that is allocated, and the most that is reserved while nothing limits it; evaluation included."""
    allocated, reserved = prediction.allocated_peak_bytes, prediction.reserved_peak_bytes
    if prediction.evaluation:
        allocated = max(allocated, prediction.evaluation.allocated_peak_bytes)
        reserved = max(reserved, prediction.evaluation.reserved_peak_bytes)
    return allocated, reserved


def left_bytes(prediction: Prediction) -> int:
    """What stays free where the stage fits; where it does not, what is missing at the least, as a negative number or 0."""
    allocated, reserved = needed_bytes(prediction)
    return prediction.usable_bytes - reserved if prediction.fits else min(prediction.usable_bytes - allocated, 0)


def verdict(prediction: Prediction) -> str:
    """Whether the stage fits, and by how much."""
    usable, left = prediction.usable_bytes, left_bytes(prediction)
    if prediction.fits:
        reach = f"{size(usable - left)} of {size(usable)} reserved at the peak, {size(left)} to spare"
        if left < prediction.bound_bytes:
            return f"fits, but only just: {reach}, which is less than the error bound"
        return f"fits: {reach}"
    request = prediction.failing_request
    if request is None:
        return f"does not fit: the evaluation reserves {size(needed_bytes(prediction)[1])}, and {size(usable)} is usable"
    free = usable - request.in_use_bytes
    if free < request.bytes:
        return f"does not fit: {size(request.bytes)} is asked for where {size(free)} is free"
    return f"does not fit: {size(request.bytes)} is asked for, and the {size(free)} that is free lies in smaller pieces"


def failure(stage: StagePlan, request: FailingRequest) -> str:
    """The request that cannot be served, in sentences."""
    return shortage(request, stage.prediction.usable_bytes, _moment(stage.choice, request), _legend(request, stage))


def shortage(request: FailingRequest, usable: int, moment: str = "", legend: str = "") -> str:
    """The request that a card of `usable` bytes cannot serve; `legend` says what the dimensions of its shape are."""
    dimensions = kept(f"{dtype(request.dtype)} {shape(request.shape)}")
    what = _ROLES[request.role][1] if request.role in _ROLES else clean(request.role)
    by = "" if request.op == "load" else f" made by {operator(request.op).removesuffix(', temporary')}"
    where = f" in {clean(request.module)}" if request.module else ""
    when = moment or _PHASES.get(request.phase, clean(request.phase))
    return (
        f"{when[:1].upper()}{when[1:]} asks for {kept(size(request.bytes))}: {dimensions}{legend}, {what}{by}{where}. "
        f"At that moment {kept(size(request.in_use_bytes))} is in use and {kept(size(request.reserved_bytes))} reserved, "
        f"of {kept(size(usable))} usable."
    )


def batch(choice: Choice) -> str:
    """How the effective batch comes about."""
    gpus = f"{counted(choice.gpus, 'GPU')}{f' on {choice.nodes} nodes' if choice.nodes > 1 else ''}"
    product = f"micro-batch {choice.micro_batch} × accumulation {choice.accumulation} × {gpus}"
    return f"{product}{', the last ones smaller,' if is_ragged(choice) else ''} = effective batch {choice.effective_batch}"


def is_ragged(choice: Choice) -> bool:
    """Whether some micro-batches are smaller than the others."""
    return choice.micro_batch * choice.accumulation * choice.gpus != choice.effective_batch


def settings(choice: Choice, asked: Choice) -> list[str]:
    """What to add to a recipe that gave one choice so that it gives the other: ``attention=efficient``.

    What follows from other knobs is left out, and so is an evaluation batch that follows the micro-batch in both.
    """
    follows = all(one.eval_batch == one.micro_batch for one in (choice, asked))
    names = [item.name for item in fields(Choice) if item.name not in _FOLLOWING]
    changed = [name for name in names if getattr(choice, name) != getattr(asked, name)]
    return [f"{name}={str(getattr(choice, name)).lower()}" for name in changed if not (follows and name == "eval_batch")]


def speed(estimate: Speed, fits: bool) -> list[str]:
    """How fast a choice is, and what the step's time goes to."""
    rates = f"{number(estimate.samples_per_second)} samples/s, {number(estimate.tokens_per_second)} tokens/s"
    hours = "" if estimate.gpu_hours is None else f", {number(estimate.gpu_hours)} GPU hours for the stage"
    room = "" if fits else "if it fitted, "
    line = f"{room}{seconds(estimate.step_seconds)} a step: {rates}, MFU {100 * estimate.flop_utilisation:.0f} %{hours}"
    shares = time_shares(estimate)
    return [f"{line}; an estimate, for ranking", *([f"of a step: {', '.join(shares)}"] if shares else [])]


def time_shares(estimate: Speed) -> list[str]:
    """What a step's time goes to, the most first, without what takes less than half a percent: ``recompute 21 %``."""
    whole = estimate.step_seconds
    ranked = sorted(estimate.seconds.items(), key=lambda item: -item[1])
    return [kept(f"{clean(name)} {100 * part / whole:.0f} %") for name, part in ranked if whole > 0 and part >= whole / 200]


def seconds(duration: float) -> str:
    """A time: ``2.46 s``, ``84 ms``."""
    return kept(f"{number(duration)} s" if duration >= 0.9995 else f"{number(1000 * duration)} ms")


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 GPU``, ``14 traced steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def number(value: float) -> str:
    """A number in about three digits: ``0.083``, ``2.46``, ``52.1``, ``136,600``."""
    if value >= 9_999_999.5:
        return f"{value:.2e}"
    digits = next((digits for limit, digits in ((0.9995, 3), (9.995, 2), (99.95, 1)) if value < limit), 0)
    return f"{value:,.{digits}f}"


def times(ratio: float) -> str:
    """A ratio: ``1.29×``."""
    return f"{number(ratio) if ratio >= 9.995 else f'{ratio:.2f}'}×"


def sample(stage: StagePlan) -> str:
    """The tokens of the longest sample."""
    images = f", {stage.image_tokens:,} of them from images" if stage.image_tokens else ""
    return f"{stage.samples_tokens:,} tokens in the longest{images}"


def parameters(stage: StagePlan) -> str:
    """How many parameters train, and how many there are."""
    return f"{count(stage.trainable_parameters)} of {count(stage.total_parameters)} train"


def bound(prediction: Prediction) -> str:
    """The error bound, as a fraction and in bytes."""
    return f"{100 * prediction.error_bound:.1f} %: the true peak may be up to {size(prediction.bound_bytes)} higher"


def _moment(choice: Choice, request: Request) -> str:
    when = _PHASES.get(request.phase, clean(request.phase))
    layer = _LAYER.search(request.module)
    if request.phase == "recompute" and layer:
        return f"{when} of block {layer[1]}"
    if request.phase == "backward" and layer and _is_recomputed(int(layer[1]), request.module, choice):
        return f"{when} of recomputed block {layer[1]}"
    return when


def _is_recomputed(block: int, module: str, choice: Choice) -> bool:
    """Whether checkpointing recomputes a block; ``every-k`` does so with blocks 0, k, 2k and so on."""
    if "vision" in module or "visual" in module:
        return choice.vision_checkpointing != "none"
    every = choice.checkpointing.removeprefix("every-")
    return block % int(every) == 0 if every.isdigit() else choice.checkpointing != "none"


def _legend(request: Request, stage: StagePlan) -> str:
    """What the dimensions are, where their pattern says it."""
    samples, tokens, dimensions = stage.choice.micro_batch, stage.samples_tokens, request.shape
    if len(dimensions) == 4 and dimensions[0] == samples and dimensions[2:] == (tokens, tokens):
        return " (samples, heads, tokens, tokens)"
    if len(dimensions) == 3 and dimensions[1:] == (tokens, tokens) and request.role == "scores":
        return " (samples × heads, tokens, tokens)"
    if len(dimensions) == 3 and dimensions[0] == samples * tokens and request.role == "dispatch":
        return " (tokens, experts, capacity)"
    if len(dimensions) == 3 and dimensions[:2] == (samples, tokens):
        return f" (samples, tokens, {'vocabulary' if request.role == 'logits' else 'features'})"
    return ""


def changes(before: Choice, after: Choice, knobs: Iterable[str]) -> str:
    """The knobs that two choices set otherwise, and how; empty where there are none."""
    pairs = ((knob, getattr(before, knob), getattr(after, knob)) for knob in knobs)
    return ", ".join(f"{label(knob)} {old} → {new}" for knob, old, new in pairs if old != new)


def sizes(split: Iterable[Sequence[int]]) -> str:
    """The sizes of micro-batches, neighbours of one size counted: ``2 × 8 + 4``."""
    counts = ((len(list(equal)), samples) for samples, equal in groupby(map(len, split)))
    return " + ".join(f"{many} × {samples}" if many > 1 else f"{samples}" for many, samples in counts)
