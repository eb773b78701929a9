"""The order of a script's loading, against PEFT's own: what it casts, in which order, on real tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from oomph.core.closed_form import constant_form
from oomph.core.events import Events
from oomph.core.layout import as_traced
from oomph.core.loading import as_scripts_do
from oomph.live.adapters import add_adapters
from oomph.live.fake import answering
from oomph.live.layers import shorten
from oomph.live.model import build, part_finder, to_fake
from oomph.live.simulate import fake_mode
from oomph.live.trace import Recorder
from oomph.recipe.schema import Lora

TARGETS = ["q_proj", "down_proj", "lm_head"]
WHOLE = 1 << 20


class Casts(TorchDispatchMode):
    """Notes the new dtype and the shape of every cast."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.seen.append((str(out.dtype).removeprefix("torch."), tuple(out.shape)))
        return out


def tiny() -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=96, num_hidden_layers=2, **sizes)


def loaded(dtype: torch.dtype) -> Events:
    """The events of our own load, of a model with adapters in float32."""
    mode, memo = fake_mode()
    model = build(tiny(), dtype, "eager")
    add_adapters(model, Lora(rank=4, target_modules=TARGETS))
    stacks = shorten(model, WHOLE)
    to_fake(model, mode)
    recorder = Recorder(model, stacks, None, memo.run)
    with answering(), mode:
        recorder.start("load")
        recorder.load(model, part_finder(model))
        recorder.finish()
    return as_traced(constant_form(recorder.trace), (1, 1, 0))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_come_and_are_cast_as_peft_does_it(dtype: torch.dtype) -> None:
    model = LlamaForCausalLM(tiny()).to(dtype)
    config = LoraConfig(r=4, target_modules=TARGETS)
    with Casts() as casts:
        get_peft_model(model, config)
    events = as_scripts_do(loaded(dtype))
    (load,) = events.segments
    births = [entry for entry in load.timeline if entry >= 0 and ".lora_" in events.kinds[entry].module]
    assert [(events.kinds[entry].dtype, events.shapes[entry]) for entry in births] == casts.seen
    half = len(births) // 2
    assert [2 * events.sizes[entry] for entry in births[:half]] == [events.sizes[entry] for entry in births[half:]]


def test_each_new_adapter_is_there_before_its_old_one_goes_and_the_base_comes_first() -> None:
    before = loaded(torch.float16)
    events = as_scripts_do(before)
    (load,) = events.segments
    adapters = [s for s in before.segments[0].timeline if ".lora_" in before.kinds[s].module]
    base = [s for s in before.segments[0].timeline if s not in adapters]
    assert load.timeline[: len(base)] == base
    casts = load.timeline[len(base) + len(adapters) :]
    assert casts[::2] == adapters
    assert [~entry for entry in casts[1::2]] == load.timeline[len(base) : len(base) + len(adapters)]
    alive = {entry for entry in load.timeline if entry >= 0} - {~entry for entry in load.timeline if entry < 0}
    assert alive == set(before.segments[0].timeline)


def test_adapters_of_a_float32_model_come_once() -> None:
    before = loaded(torch.float32)
    after = as_scripts_do(before)
    assert sorted(after.segments[0].timeline) == sorted(before.segments[0].timeline)
    assert after.sizes == before.sizes
