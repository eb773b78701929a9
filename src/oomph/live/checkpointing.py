"""Activation checkpointing: which blocks keep their activations for the backward, and which are run again in it.

transformers recomputes blocks one by one: each `GradientCheckpointingLayer` looks at its own ``gradient_checkpointing``
and calls its own ``_gradient_checkpointing_func`` (transformers 5.23, modeling_layers.py). ``activation_checkpointing_enable``
can skip blocks itself, but it counts those of the vision tower and of the language model together.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from oomph.errors import UserError
from oomph.live.model import part_finder
from oomph.live.offload import checkpoint_on_host

_STRIDES = {"blocks": 1, "blocks-offload": 1, "every-2": 2, "every-3": 3, "every-4": 4}


def apply_checkpointing(model: PreTrainedModel, language: str, vision: str) -> None:
    """Chooses the blocks that are recomputed in the backward, in place; they keep their inputs only.

    It may be called again between two steps, with other settings: what they compute stays the same.

    transformers also makes the embeddings' outputs require gradients, for adapters on a frozen model; a frozen vision
    tower would keep a graph for nothing, so that is undone.

    Args:
        model: with all of its layers, since a block is known by its number.
        language: ``none``, ``blocks`` for every block, ``every-2``, ``every-3`` or ``every-4`` for blocks 0, k, 2k and so
            on, or ``blocks-offload`` for every block, with its input in host memory until the backward. For all blocks
            outside the vision tower and the projector.
        vision: ``none`` or ``blocks``, for the blocks of the vision tower and the projector.

    Raises:
        UserError: transformers cannot recompute this model's blocks.
    """
    if language == vision == "none":
        if model.is_activation_checkpointing:
            model.activation_checkpointing_disable()
        return
    blocks = list(_blocks(model))
    if not model.supports_gradient_checkpointing or not blocks:
        raise UserError(
            f"transformers cannot recompute the blocks of {type(model).__name__} in the backward",
            "set checkpointing and vision_checkpointing to none",
        )
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    for block, in_language, number in blocks:
        setting = language if in_language else vision
        block.gradient_checkpointing = setting != "none" and number % _STRIDES[setting] == 0
        if setting == "blocks-offload":
            block._gradient_checkpointing_func = checkpoint_on_host  # type: ignore[assignment]


def _blocks(model: PreTrainedModel) -> Iterator[tuple[GradientCheckpointingLayer, bool, int]]:
    """The blocks, whether each belongs to the language model, and its number in its stack; 0 for one outside of a stack."""
    part = part_finder(model)
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            name = path.rpartition(".")[2]
            in_language = part(f"{path}.weight") not in ("vision", "projector")
            yield module, in_language, int(name) if name.isdigit() else 0
