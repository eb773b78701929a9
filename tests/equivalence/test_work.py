"""What the tracer says that a step computes and moves is what torch counts in the same step, run for real on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from oomph.core.closed_form import Family, constant_form, fit
from oomph.core.devices import find_gpu
from oomph.core.layout import Shape
from oomph.core.speed import cost
from oomph.core.trace import Operation, Trace
from oomph.core.unroll import UNITS
from oomph.core.work import Work
from oomph.live.batch import images_of
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.memo import Memo
from oomph.live.model import build, compose_llava
from oomph.live.optimizers import make_optimizer
from oomph.live.simulate import Setup, Simulator
from oomph.live.step import LOSSES, train_step
from oomph.live.tensors import dtype_name
from oomph.live.work import Meter

WHOLE = 1 << 20
SHAPE = Shape(2, 128, 2)
AMPERE = (8, 0)


def llava(layers: int = 3) -> PretrainedConfig:
    """LLaVA with a small CLIP tower and a small Llama, two query heads to a key head."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
    tower = CLIPVisionConfig(image_size=112, patch_size=14, **sizes)
    return compose_llava(tower, LlamaConfig(num_key_value_heads=2, vocab_size=512, **sizes), -2, "patch")


def qwen(layers: int = 3) -> PretrainedConfig:
    """A Qwen3-MoE, two of eight experts to a token."""
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": layers}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return Qwen3MoeConfig(num_experts=8, num_experts_per_tok=2, **sizes, **heads)


def traced(
    config: PretrainedConfig,
    shape: Shape = SHAPE,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attention: Any = "sdpa",
    loss: str = "full",
    checkpointing: str = "blocks",
    capability: tuple[int, int] | None = AMPERE,
    units: int = WHOLE,
) -> Trace:
    """A step on fake tensors."""
    vision = "blocks" if checkpointing != "none" else "none"
    precision: Any = dtype_name(dtype)
    setup = Setup(attention, loss, "adamw-fused", checkpointing, vision, capability, precision=precision)
    images = images_of(config, None) if hasattr(config, "vision_config") else None
    shape = shape if images is not None else shape._replace(images=0)
    return Simulator(build(config, dtype, attention), setup, units, images).trace(shape)


def micro_batches(trace: Trace) -> list[Operation]:
    """The operators of the two micro-batches."""
    return [operation for operation in trace.operations if operation.piece in ("first", "next")]


def total(terms: tuple[tuple[int, ...], ...]) -> int:
    return sum(map(prod, terms))


# Against a real step.


class Metered(TorchDispatchMode):
    """Adds up the traffic of real operators, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.meter, self.bytes = Meter(None), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        done = self.meter.done(func, args, kwargs or {}, outputs)
        if done is not None:
            self.bytes[_kind(str(func))] += total(done.traffic)
        return outputs


def really_run(config: PretrainedConfig, *modes: Any) -> None:
    """Two micro-batches on the CPU, under the modes."""
    model = build(config, torch.float32, "eager").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for buffer in model.buffers():
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    apply_checkpointing(model, "blocks", "blocks")
    images = images_of(config, None)
    assert images is not None
    ids = torch.randint(0, 500, (SHAPE.samples, SHAPE.tokens))
    batch = {"input_ids": ids, "labels": ids.clone(), **images.inputs(SHAPE.images, torch.float32)}
    batch["input_ids"][:, : images.tokens] = config.image_token_id
    batch["pixel_values"].zero_()

    def on(phase: str, index: int) -> None:
        if phase == "optimizer":
            while entered:
                entered.pop().__exit__(None, None, None)

    entered = [*modes]
    for mode in modes:
        mode.__enter__()
    optimizer = make_optimizer(model, "adamw-fused")
    train_step(model, optimizer, [lambda: dict(batch)] * 2, LOSSES["full"], 1, on=on)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take most of the time of a small model's step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_real_step_computes_and_moves_what_its_trace_says() -> None:
    config = llava()
    flops, traffic = FlopCounterMode(display=False), Metered()
    really_run(config, flops, traffic)
    operations = micro_batches(traced(config, dtype=torch.float32, attention="eager", capability=None))
    assert sum(total(operation.flops) for operation in operations) == flops.get_total_flops() > 0
    moved = Counter[str]()
    for operation in operations:
        moved[_kind(operation.name)] += total(operation.traffic)
    differing = {name: traffic.bytes[name] - moved[name] for name in {*moved, *traffic.bytes}}
    assert {name: n for name, n in differing.items() if n and name not in PACKED_SEARCH} == {}
    assert all(0 <= differing[name] < 100 for name in PACKED_SEARCH)


PACKED_SEARCH = {"aten.eq.Scalar", "aten.all.default"}
"""transformers looks for several sequences in one row, and does not on fake tensors."""


def _kind(name: str) -> str:
    """A mode makes autograd add up gradients out of place, which the tracer puts right; the traffic is the same."""
    return "aten.add" if name in ("aten.add.Tensor", "aten.add_.Tensor") else name


# Against torch's formulas, operator by operator, with the kernels of a GPU.


@pytest.mark.parametrize(
    ("config", "attention", "loss"),
    [(llava, "sdpa", "chunked"), (llava, "efficient", "full"), (llava, "eager-fp32", "full-shifted"), (qwen, "sdpa", "full")],
)
def test_operators_compute_what_torch_counts(
    config: Callable[[], PretrainedConfig], attention: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Counter[str] = Counter()
    run = Memo.run

    def counting(self: Memo, func: Any, args: Any, kwargs: Any) -> Any:
        outputs = run(self, func, args, kwargs)
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            counted[str(func)] += formula(*args, **kwargs, out_val=outputs)
        return outputs

    monkeypatch.setattr(Memo, "run", counting)
    trace = traced(config(), Shape(2, 256, 2), attention=attention, loss=loss)
    noted: Counter[str] = Counter()
    for operation in trace.operations:
        noted[operation.name] += total(operation.flops)
    unknown_to_torch = {"aten._grouped_mm.default"}
    assert {name: n for name, n in noted.items() if n and name not in unknown_to_torch} == dict(counted)
    assert all(noted[name] for name in unknown_to_torch & set(noted))


# Formulas against a trace at another shape, of all layers.


def by_phase(work: Work, shape: Shape) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Launches, floating-point operations and bytes."""
    found: dict[tuple[str, str], list[int]] = {}
    for row, flops, traffic in zip(work.rows, *work.evaluate(shape), strict=True):
        sums = found.setdefault((row.piece, row.phase), [0, 0, 0])
        for at, value in enumerate((row.launches, flops, traffic)):
            sums[at] += round(value) * row.times
    return {key: (a, b, c) for key, (a, b, c) in found.items()}


def test_formulas_give_the_work_of_a_trace_at_another_shape_and_depth() -> None:
    *made, held_out = (Shape(*shape) for shape in Family(False, 2).examples(64))
    traces = [(shape, traced(llava(8), shape, units=UNITS)) for shape in made]
    form = fit(traces, (held_out, traced(llava(8), held_out, units=UNITS + 1)))
    assert form.work.note == ""
    shape = Shape(4, 700, 4)
    direct = constant_form(traced(llava(8), shape)).work
    assert by_phase(form.work, shape) == by_phase(direct, shape)
    assert set(by_phase(direct, shape)) == {
        *((piece, phase) for piece in ("first", "next") for phase in ("forward", "recompute", "backward")),
        ("step/optimizer", "optimizer"),
        ("evaluate", "evaluate"),
    }


def test_more_recomputation_is_never_faster() -> None:
    """What is recomputed comes on top; forward and backward stay as they are."""
    gpu = find_gpu("A100-SXM4-40GB")
    found = [cost(constant_form(traced(llava(), checkpointing=value)), SHAPE, gpu) for value in ("none", "every-2", "blocks")]
    recomputed = [made.next.recompute for made in found]
    assert recomputed[0] == 0
    assert recomputed == sorted(set(recomputed))
    assert len({made.flops for made in found}) == 1
    assert all(made.next.forward >= found[0].next.forward for made in found)
    assert all(made.next.backward == pytest.approx(found[0].next.backward, rel=0.02) for made in found)
