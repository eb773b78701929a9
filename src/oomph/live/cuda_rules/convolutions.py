"""Workspaces of convolutions, such as the patch embedding of a vision tower: what of cuDNN's choice can be said.

PyTorch runs the first plan that cuDNN's heuristics name and that can be built, and allocates its workspace for the call
(aten/src/ATen/native/cudnn/Conv_v8.cpp, ``run_conv_plan``). cuDNN 9.20, asked without a GPU, names plans that copy all tensors
into another layout, or plans that copy nothing, by rules of its own.
"""

from __future__ import annotations

import math

import torch

from oomph.core.cudnn_sizes import convolution_copies
from oomph.live.cuda_rules.program import Arguments, Device, Extra, Program, Rule, sized

_FIRST_WITH_COPIES = 80
_NEVER_MORE = (80, 90, 100, 103)


def _copies(device: Device, image: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, call: Arguments) -> Extra | None:
    plain = call["groups"] == 1 and not call["transposed"] and image.is_contiguous()
    if not plain or (device.sm < _FIRST_WITH_COPIES and image.dim() == 4):
        return None
    pixels, taps, places = (math.prod(int(extent) for extent in tensor.shape[2:]) for tensor in (image, weight, output))
    numbers = int(image.size(0)), int(image.size(1)), pixels, int(weight.size(0)), taps, places, image.element_size()
    return sized("workspace", convolution_copies, *numbers)


def convolution(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """Forward: copies of image, weight and result, from sm_80 on; before, convolutions over planes copy nothing."""
    found = _copies(device, call["input"], call["weight"], outputs[0], call)
    return Program(after=(found,)) if found else None


def convolution_backward(device: Device, call: Arguments, outputs: tuple[torch.Tensor, ...]) -> Program | None:
    """Gradient of the weight: the same copies. Partial sums of a split over images are not modelled."""
    if not call["output_mask"][1]:
        return None
    found = _copies(device, call["input"], call["weight"], call["grad_output"], call)
    return Program(after=(found,)) if found else None


def is_settled(device: Device, func: torch._ops.OpOverload) -> bool:
    """Whether cuDNN never asked for more than these copies: forward, on the cards named; on sm_80 it always chose them."""
    return func is torch.ops.aten.convolution.default and device.sm in _NEVER_MORE


WORKSPACES: dict[torch._ops.OpOverload, Rule] = {
    torch.ops.aten.convolution.default: convolution,
    torch.ops.aten.convolution_backward.default: convolution_backward,
}
