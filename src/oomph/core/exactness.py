"""What a change of the configuration does to the mathematics of a step, in words."""

from __future__ import annotations

from typing import Any

from oomph.core.eight_bit import EIGHT_BIT, same_states
from oomph.records import Choice

_MATHEMATICS = ("effective_batch", "precision", "master_weights")
_WHY: dict[tuple[str, Any], str] = {
    ("attention", "sdpa"): "PyTorch's fused kernels never write out the scores",
    ("attention", "flash"): "FlashAttention never writes out the scores",
    ("attention", "efficient"): "the memory-efficient kernel never writes out the scores",
    ("attention", "eager"): "scores are written out",
    ("loss", "chunked"): "the logits of a sixteenth of the tokens exist at a time",
    ("loss", "full"): "without the shifted copy of the logits",
    ("checkpointing", "none"): "nothing is computed twice",
    ("checkpointing", "every-2"): "every second block is computed twice, the others keep their activations",
    ("checkpointing", "blocks"): "every block keeps its input alone and is computed twice",
    ("checkpointing", "blocks-offload"): "the inputs of blocks wait in host memory",
    ("vision_checkpointing", "none"): "the vision tower keeps its activations",
    ("vision_checkpointing", "blocks"): "the blocks of the vision tower are computed twice",
    ("optimizer", "adamw-fused"): "one kernel without temporary copies",
    ("optimizer", "adamw-foreach"): "lists of tensors at a time",
    ("optimizer", "adamw-8bit"): "all states stay on the GPU",
    ("optimizer", "adamw-8bit-paged"): "the driver moves large states to the host where the GPU is full",
    ("optimizer_offload", True): "AdamW's states are in host memory, and it runs there",
    ("optimizer_offload", False): "AdamW runs on the GPU",
    ("sharding", "ddp"): "each GPU holds the whole model",
    ("sharding", "zero1"): "the GPUs divide optimizer states",
    ("sharding", "zero2"): "the GPUs divide optimizer states and gradients",
    ("sharding", "zero3"): "the GPUs divide weights, gradients and optimizer states",
    ("sharding", "fsdp2"): "the GPUs divide weights, gradients and optimizer states",
    ("sharding", "fsdp2-no-reshard"): "as fsdp2, and gathered weights stay until the backward is done",
    ("sharding", "fsdp2-hybrid"): "as fsdp2 within a machine, repeated over the machines",
    ("expandable_segments", True): "the allocator grows segments instead of holding on to pieces",
    ("expandable_segments", False): "PyTorch's default",
}


def change(knob: str, asked: Choice, choice: Choice) -> str:
    """A changed setting in words: its value, the one before, and what the new one does."""
    before, after = getattr(asked, knob), getattr(choice, knob)
    if knob == "micro_batch":
        cut = f"{before} × {asked.accumulation} becomes {after} × {choice.accumulation}"
        return f"{cut}, the same samples of a GPU in other pieces"
    why = _WHY.get((knob, after))
    return f"{_word(before)} becomes {_word(after)}{': ' if why else ''}{why or ''}"


def is_exact(asked: Choice, choice: Choice, drops: bool, couples: bool = False) -> bool:
    """Whether both choices give the same gradient and the same update, in exact arithmetic.

    Args:
        asked: the choice to compare with.
        choice: another with the same effective batch.
        drops: whether the model has dropout. Micro-batches of other samples draw other masks.
        couples: whether the loss of a sample depends on those beside it in its micro-batch.
    """
    same = all(getattr(asked, name) == getattr(choice, name) for name in _MATHEMATICS)
    recut = (drops or couples) and asked.micro_batch != choice.micro_batch
    return same and same_states(asked.optimizer, choice.optimizer) and not recut


def exactness(asked: Choice, choice: Choice, routes: bool, drops: bool, couples: bool = False) -> str:
    """What is exact about a choice beside the one that was asked for, in words.

    Args:
        asked: the choice to compare with.
        choice: another with the same effective batch.
        routes: whether the model sends tokens to experts.
        drops: whether it has dropout.
        couples: whether the loss of a sample depends on those beside it in its micro-batch.
    """
    if not is_exact(asked, choice, False):
        return "another mathematics: precision, the weights that the optimizer updates or the bits of its states differ"
    if asked == choice:
        return "the configuration itself"
    exact = is_exact(asked, choice, drops, couples)
    text = "the same gradient and update in exact arithmetic"
    if not exact:
        causes = [_DROPS] * drops + [_COUPLES] * couples
        text = f"the same but for {' and '.join(causes)}"
    reasons = [words for knobs, words in _ROUNDING.items() if any(_rounds(k, asked, choice) for k in knobs)]
    if not reasons:
        return "the same operations on the same numbers" if exact else text
    *others, last = reasons
    text += f"; in floating point, {', '.join(others)}{' and ' if others else ''}{last}"
    return f"{text}; a token whose best experts are nearly equal may take another one" if routes else text


_DROPS = "dropout, which draws other masks for other micro-batches"
_COUPLES = "the experts' load, which is evened or limited within each micro-batch"
_ROUNDING = {
    ("micro_batch", "loss"): "sums run in another order",
    ("sharding",): "sums over GPUs run in another order",
    ("attention",): "attention rounds elsewhere",
    ("optimizer", "optimizer_offload"): "the optimizer's kernel rounds elsewhere",
}


def _rounds(knob: str, asked: Choice, choice: Choice) -> bool:
    """Whether a knob of `_ROUNDING` differs in what it computes: where states of 8 bits lie changes none of them."""
    before, after = getattr(asked, knob), getattr(choice, knob)
    return before != after and not (knob == "optimizer" and before in EIGHT_BIT and after in EIGHT_BIT)


def _word(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
