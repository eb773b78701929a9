"""What a precision means: the dtypes of weights and inputs, autocast around the forward, the scale of the loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oomph.records import Precision


@dataclass(frozen=True)
class Arithmetic:
    """What a step computes in.

    Attributes:
        frozen: dtype of weights that do not train; what the model is built in.
        trained: dtype of weights that train, of their gradients and of the optimizer's states. That of adapters is float32.
        inputs: dtype of the images that the collator makes.
        autocast: dtype that autocast casts the inputs of matrix products to; none without autocast.
        scaled: whether the loss is scaled, so that gradients in float16 do not vanish.
    """

    frozen: torch.dtype
    trained: torch.dtype
    inputs: torch.dtype
    autocast: torch.dtype | None = None
    scaled: bool = False

    def around_forward(self, device_type: str) -> AbstractContextManager[object]:
        """What a forward runs in, with its loss: a new autocast, or nothing. The backward runs outside of it."""
        return nullcontext() if self.autocast is None else torch.autocast(device_type, self.autocast)

    def make_scaler(self, device_type: str) -> torch.amp.GradScaler | None:
        """Scales the loss and unscales the gradients; none where the loss is not scaled.

        Its two tensors exist from the beginning, so that they do not lie between those of the first step.
        """
        if not self.scaled:
            return None
        scaler = torch.amp.GradScaler(device_type)
        scaler.scale(torch.zeros((), device=device_type))
        return scaler

    def lift(self, model: PreTrainedModel, part: Callable[[str], str]) -> None:
        """Makes float32 of what a model that was built in `frozen` holds in float32, in place.

        These are adapters, weights that train if `trained` says so, and what transformers keeps in float32 in a model of
        16 bits (``_keep_in_fp32_modules``, ``_keep_in_fp32_modules_strict``: transformers 5.23, modeling_utils.py,
        ``_get_dtype_plan``). All else stays as it is: frozen weights that are float32 or quantized already, buffers.

        Args:
            model: what trains in it requires a gradient.
            part: a function from a parameter's name to its part, as `model.part_finder` gives it.
        """
        kept = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in model._get_dtype_plan(self.frozen)]
        for name, parameter in model.named_parameters():
            trained = parameter.requires_grad and self.trained == torch.float32
            if trained or part(name) == "lora" or any(pattern.search(name) for pattern in kept):
                _lift(parameter)
        for name, buffer in model.named_buffers():
            if any(pattern.search(name) for pattern in kept):
                _lift(buffer)


def scaler_states(scaler: torch.amp.GradScaler | None) -> Iterator[Tensor]:
    """The tensors that a scaler keeps: the scale, and how many steps it has not changed for."""
    if scaler is not None:
        yield from (tensor for tensor in (scaler._scale, scaler._growth_tracker) if tensor is not None)


def _lift(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.data = tensor.data.float()


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_MEANINGS: Final[dict[Precision, Arithmetic]] = {
    "bfloat16": Arithmetic(_BF16, _BF16, _BF16),
    "float16": Arithmetic(_FP16, _FP16, _FP16),
    "float32": Arithmetic(_FP32, _FP32, _FP32),
    "bfloat16-mixed": Arithmetic(_BF16, _FP32, _BF16, autocast=_BF16),
    "float16-mixed": Arithmetic(_FP16, _FP32, _FP16, autocast=_FP16, scaled=True),
}


def arithmetic_of(precision: Precision) -> Arithmetic:
    """What the Choice's `precision` means."""
    return _MEANINGS[precision]
