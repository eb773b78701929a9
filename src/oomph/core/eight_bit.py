"""AdamW with states of 8 bits, as bitsandbytes has it: what its states take on the GPU, tensor by tensor.

From bitsandbytes 0.50.2, ``bitsandbytes/optim/optimizer.py``: ``Optimizer2State.init_state`` and ``get_state_buffer``.

* A tensor of fewer than 4096 elements has two float32 moments.
* A larger one has two moments of one byte, and for each a float32 maximum of every block of 256 elements.
* One pair of float32 maps of the 256 values that a byte stands for serves all tensors of an optimizer.
* There is no step counter on the GPU.
* Paged, the moments of tensors of 100,000 elements and more are in managed memory, which is not the caching allocator's and
  which the driver moves to the host where the GPU has no room. Maxima and maps stay the allocator's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from oomph.core.trace import Parameter
from oomph.records import Optimizer

EIGHT_BIT: Final[tuple[Optimizer, ...]] = ("adamw-8bit", "adamw-8bit-paged")
"""The optimizers with states of 8 bits, by falling memory. Their mathematics is not that of the others."""

_LEAST_ELEMENTS: Final = 4096
_PAGED_ELEMENTS: Final = 100_000
_BLOCK: Final = 256
_MAP_VALUES: Final = 256
_FP32: Final = 4


def same_states(one: Optimizer, other: Optimizer) -> bool:
    """Whether two optimizers hold their states in the same way: both in 8 bits, or neither."""
    return (one in EIGHT_BIT) == (other in EIGHT_BIT)


def state_bytes(parameters: Iterable[Parameter], optimizer: Optimizer) -> int:
    """Bytes of the caching allocator that the states of parameters take, without rounding.

    Args:
        parameters: those that get a gradient.
        optimizer: one of `EIGHT_BIT`.
    """
    sizes = [parameter.numel for parameter in parameters]
    quantized = [elements for elements in sizes if elements >= _LEAST_ELEMENTS]
    held = [elements for elements in quantized if optimizer == "adamw-8bit" or elements < _PAGED_ELEMENTS]
    whole = _FP32 * (sum(sizes) - sum(quantized))
    maxima = _FP32 * sum(-(-elements // _BLOCK) for elements in quantized)
    maps = _FP32 * _MAP_VALUES if quantized else 0
    return 2 * (whole + sum(held) + maxima + maps)
