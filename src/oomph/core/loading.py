"""The order in which a model comes onto the GPU, where it is not our own trainer's.

The trainer allocates weights and adapters module by module, children first. The order decides which blocks lie side by side,
and so reserved bytes, and by rests that are not split off allocated bytes as well.
"""

from __future__ import annotations

from oomph.core.events import Events, Segment
from oomph.core.ranks import copied
from oomph.core.trace import ITEM_BYTES

_FLOAT32 = "float32"


def as_scripts_do(events: Events) -> Events:
    """The events of a run that moves the model to the GPU first, and then gives it adapters with ``peft.get_peft_model``.

    Modules and the base model's weights come in the trace's order, which is that of ``Module.to``. Then every adapter comes in
    the dtype of its base layer, if that is a floating-point one (PEFT 0.20, tuners/tuners_utils.py,
    ``_move_adapter_to_device_of_base_layer``), and at last those in 16 bits become float32 one after the other, each new tensor
    before its old one goes (``cast_adapter_dtype``). Adapters of layers come in the order of the layers; those of parameters
    are taken to come where their modules are.

    Args:
        events: whose first segment is ``load``, of a model with adapters in float32.
    """
    load, *others = events.segments
    adapters = [s for s in load.timeline if s >= 0 and _is_adapter(events, s)]
    base = [entry for entry in load.timeline if entry not in set(adapters)]
    dtypes = {(events.kinds[s].module, events.layers[s]): events.kinds[s].dtype for s in reversed(base) if s >= 0}
    result = copied(events)
    arriving, casting = list[int](), list[int]()
    for adapter in adapters:
        kind, layer = events.kinds[adapter], events.layers[adapter]
        owner = kind.module.rpartition(".lora_")[0]
        dtype = dtypes.get((f"{owner}.base_layer", layer), _FLOAT32)
        if ITEM_BYTES[dtype] != 2 or kind.dtype != _FLOAT32:
            arriving.append(adapter)
            continue
        narrow = kind._replace(op="load:16 bits", role="temporary", dtype=dtype)
        arriving.append(result.add(events.sizes[adapter] // 2, events.shapes[adapter], narrow, layer))
        casting += [adapter, ~arriving[-1]]
    result.segments = [Segment(load.name, [*base, *arriving, *casting], load.marks, load.repeat), *others]
    return result


def _is_adapter(events: Events, storage: int) -> bool:
    return ".lora_" in events.kinds[storage].module
