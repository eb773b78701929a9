"""Precisions: what is held in which dtype, what a mixed step computes, and what a scaled loss does."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from oomph.core.closed_form import ClosedForm
from oomph.core.forms import FormKey
from oomph.live.attention import eager_fp32
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.model import build, part_finder
from oomph.live.optimizers import make_optimizer
from oomph.live.precision import arithmetic_of, scaler_states
from oomph.live.source import make_form
from oomph.live.step import LOSSES, commit, train_step
from oomph.records import Precision

PRECISIONS: tuple[Precision, ...] = typing.get_args(Precision)
MIXED = tuple(precision for precision in PRECISIONS if precision.endswith("-mixed"))
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=64,
    tie_word_embeddings=True,
)
OPTIMIZERS = {
    "fused": partial(make_optimizer, kind="adamw-fused"),
    "foreach": partial(make_optimizer, kind="adamw-foreach"),
    "loop": partial(make_optimizer, kind="adamw-loop"),
    "on the host": partial(make_optimizer, kind="adamw-fused", offload=True),
}


def on_meta(precision: Precision, frozen: tuple[str, ...] = ()) -> PreTrainedModel:
    """The tied Llama; what `frozen` is a part of does not train."""
    arithmetic = arithmetic_of(precision)
    model = build(CONFIG, arithmetic.frozen, "sdpa")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    arithmetic.lift(model, lambda name: "lora" if "o_proj" in name else "language")
    return model


# What is held in which dtype.


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_says_what_weights_are(precision: Precision) -> None:
    named, _, mixed = precision.partition("-")
    held = getattr(torch, named)
    dtypes = {name: p.dtype for name, p in on_meta(precision, ("mlp", "norm", "o_proj")).named_parameters()}
    for name, dtype in dtypes.items():
        trained = not any(part in name for part in ("mlp", "norm", "o_proj"))
        lifted = "o_proj" in name or (trained and mixed)
        assert dtype == (torch.float32 if lifted else held), name
    arithmetic = arithmetic_of(precision)
    assert (arithmetic.autocast is not None) == bool(mixed)
    assert arithmetic.scaled == (precision == "float16-mixed") == (arithmetic.make_scaler("cpu") is not None)
    assert arithmetic.inputs == (arithmetic.autocast or held)


def test_lifting_keeps_tied_weights_tied_and_frozen_float32_weights_as_they_are() -> None:
    model = on_meta("bfloat16-mixed")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.dtype == torch.float32
    norm = model.base_model.norm.weight
    norm.requires_grad_(False)
    arithmetic_of("bfloat16-mixed").lift(model, lambda name: "language")
    assert norm.dtype == torch.float32


@pytest.mark.parametrize(("precision", "kept"), [("float16", 2), ("bfloat16", 1), ("float32", 0)])
def test_what_transformers_keeps_in_float32_is_kept(precision: Precision, kept: int) -> None:
    model = build(CONFIG, arithmetic_of(precision).frozen, "sdpa")
    model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = {"layers.0.mlp.up_proj"}, {"layers.*.self_attn.q_proj"}
    arithmetic_of(precision).lift(model, part_finder(model))
    found = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    expected = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"} if kept else set()
    expected |= {"model.layers.0.mlp.up_proj.weight"} if kept == 2 else set()
    assert precision == "float32" or found == expected


# What a step computes.


def real(precision: Precision, checkpointing: str = "none") -> PreTrainedModel:
    """The Llama with weights, the same in every precision but for rounding."""
    model = on_meta(precision).to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(std=0.1, generator=random))
    model.base_model.rotary_emb.inv_freq.copy_(1e4 ** -(torch.arange(0, 16, 2) / 16))
    apply_checkpointing(model, checkpointing, "none")
    return model


def batch() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.empty((2, 12), dtype=torch.long).random_(0, 64, generator=random)
    return {"input_ids": ids, "labels": ids.clone()}


def step(model: PreTrainedModel, precision: Precision, optimizer: torch.optim.Optimizer, **settings: Any) -> Tensor:
    around_forward = partial(arithmetic_of(precision).around_forward, "cpu")
    return train_step(model, optimizer, [batch, batch], LOSSES["full"], 44, around_forward=around_forward, **settings)


def weights(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Gradients(torch.optim.Optimizer):
    """Keeps the gradients instead of stepping."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.parameters(), {})
        self.found = torch.empty(0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.found = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])


def gradients(precision: Precision, checkpointing: str = "none", scaler: torch.amp.GradScaler | None = None) -> Tensor:
    model = real(precision, checkpointing)
    found = Gradients(model)
    step(model, precision, found, max_grad_norm=None, scaler=scaler)
    return found.found


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("precision", MIXED)
def test_a_mixed_gradient_is_that_of_float32_but_for_rounding(precision: Precision, checkpointing: str) -> None:
    exact = gradients("float32")
    mixed = gradients(precision, checkpointing, arithmetic_of(precision).make_scaler("cpu"))
    assert mixed.dtype == torch.float32
    # Half a unit in the last place of bfloat16's 8 bits or float16's 11, and room for a few dozen products.
    bound = {"bfloat16-mixed": 2**-5, "float16-mixed": 2**-8}[precision]
    assert 0 < (mixed - exact).norm() < bound * exact.norm()


def test_scores_in_float32_stay_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        _, mixed = eager_fp32(nn.Identity(), query, key, value, None, 0.25)
    _, plain = eager_fp32(nn.Identity(), query, key, value, None, 0.25)
    assert torch.equal(mixed, plain)


def test_a_mixed_gradient_is_the_same_with_and_without_recomputation() -> None:
    assert torch.equal(gradients("bfloat16-mixed"), gradients("bfloat16-mixed", "blocks"))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_scaled_loss_gives_the_same_update(kind: str) -> None:
    """Scales are powers of two: nothing is rounded by them, and in bfloat16 nothing overflows or vanishes."""
    updated = []
    for scaler in (None, arithmetic_of("float16-mixed").make_scaler("cpu")):
        model = real("bfloat16-mixed")
        optimizer = OPTIMIZERS[kind](model)
        losses = [step(model, "bfloat16-mixed", optimizer, scaler=scaler) for _ in range(2)]
        updated.append((weights(model), torch.stack(losses)))
    assert torch.equal(updated[0][0], updated[1][0])
    assert torch.equal(updated[0][1], updated[1][1])
    assert not torch.equal(updated[0][0], weights(real("bfloat16-mixed")))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_leaves_the_step_out_and_halves_the_scale(kind: str) -> None:
    model = real("float16-mixed")
    optimizer, scaler = OPTIMIZERS[kind](model), arithmetic_of("float16-mixed").make_scaler("cpu")
    assert scaler is not None
    step(model, "float16-mixed", optimizer, scaler=scaler)
    before, scale = weights(model), scaler.get_scale()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
    commit(optimizer, scaler=scaler)
    assert torch.equal(weights(model), before)
    assert scaler.get_scale() == scale / 2
    assert all(parameter.grad is None for parameter in model.parameters())
    step(model, "float16-mixed", optimizer, scaler=scaler)
    assert not torch.equal(weights(model), before)


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    updated = []
    for scaler in (None, arithmetic_of("float16-mixed").make_scaler("cpu")):
        model = real("bfloat16-mixed")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step(model, "bfloat16-mixed", optimizer, scaler=scaler, max_grad_norm=0.01)
        updated.append(weights(model))
    assert torch.equal(*updated)
    assert (updated[0] - weights(real("bfloat16-mixed"))).norm() == pytest.approx(0.01, rel=1e-3)


# What is traced.


@pytest.fixture(scope="module")
def form_of(plain_key: FormKey, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Precision, str], ClosedForm]:
    """The form of a small Llama of eight layers."""
    folder: Path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 8, "tie_word_embeddings": False})
    config.save_pretrained(folder)
    known: dict[tuple[Precision, str], ClosedForm] = {}

    def find(precision: Precision, checkpointing: str) -> ClosedForm:
        if (precision, checkpointing) not in known:
            key = replace(plain_key, model=str(folder), precision=precision, checkpointing=checkpointing)
            form = make_form(key).form
            assert form is not None
            known[precision, checkpointing] = form
        return known[precision, checkpointing]

    return find


def births(form: ClosedForm, piece: str, op: str) -> list[int]:
    """The storages that an operator makes in a piece of the timeline."""
    (found,) = (p for p in form.pieces if p.name == piece)
    made = [entry for entry in form.timeline[found.start : found.stop] if entry >= 0]
    return [entry for entry in made if form.kinds[form.kind[entry]].op == op]


@pytest.mark.parametrize(("precision", "checkpointing"), [("bfloat16-mixed", "blocks"), ("float16-mixed", "none")])
def test_mixed_steps_have_closed_forms(precision: Precision, checkpointing: str, form_of: Any) -> None:
    form = form_of(precision, checkpointing)
    lower = precision.removesuffix("-mixed")
    roles = {role: {kind.dtype for kind in form.kinds if kind.role == role} for role in ("weight", "gradient", "optimizer")}
    assert roles["weight"] == roles["gradient"] == {"float32"}
    assert roles["optimizer"] - {"int32"} == {"float32"}
    products = [kind for kind in form.kinds if kind.op in ("aten.mm.default", "aten.bmm.default")]
    assert products
    assert {kind.dtype for kind in products} == {lower}


def test_casts_of_weights_are_kept_until_the_forward_ends(form_of: Any) -> None:
    """Seven matrices of each layer, and the head: cast once in a forward, dropped after the loss, or with the backward."""
    form = form_of("bfloat16-mixed", "blocks")
    matrices = {p.numel * 2 for p in form.parameters if len(p.shape) == 2}
    cast = births(form, "first", "aten._to_copy.default")
    in_forward = [s for s in cast if form.kinds[form.kind[s]].phase == "forward" and is_constant(form, s)]
    assert sorted({form.formulas[form.formula[s]].itemsize for s in in_forward}) == [2]
    assert len(in_forward) == 7 * 8 + 1
    again = [s for s in cast if form.kinds[form.kind[s]].phase == "recompute" and is_constant(form, s)]
    assert len(again) == 7 * 8
    assert {size(form, s) for s in in_forward} == matrices
    start = next(p.start for p in form.pieces if p.name == "first")
    backward = next(at for at, phase in form.marks if at > start and phase == "backward")
    inside = [s for s in in_forward if form.layer[s] >= 0]
    ends = {form.timeline.index(~s) for s in inside}
    last_birth = max(form.timeline.index(s) for s in in_forward)
    assert len(inside) == 7 * 8
    assert last_birth < min(ends)
    assert max(ends) < backward


def is_constant(form: ClosedForm, storage: int) -> bool:
    return all(dimension.feature == 0 for dimension in form.formulas[form.formula[storage]].dimensions)


def size(form: ClosedForm, storage: int) -> int:
    formula = form.formulas[form.formula[storage]]
    total = formula.itemsize
    for dimension in formula.dimensions:
        total *= dimension.factor
    return total


def test_the_scaler_keeps_its_two_tensors_from_the_beginning(form_of: Any) -> None:
    form = form_of("float16-mixed", "none")
    load = next(piece for piece in form.pieces if piece.name == "load")
    entries = form.timeline[load.start : load.stop]
    kept = [entry for entry in entries if entry >= 0 and ~entry not in entries]
    scaler = [form.kinds[form.kind[entry]] for entry in kept if form.kinds[form.kind[entry]].role != "weight"]
    assert [(kind.role, kind.dtype) for kind in scaler] == [("optimizer", "float32"), ("optimizer", "int32")]
    made = arithmetic_of("float16-mixed").make_scaler("cpu")
    assert [str(tensor.dtype) for tensor in scaler_states(made)] == ["torch.float32", "torch.int32"]


def test_unscaling_and_updating_the_scale_leave_nothing_behind(form_of: Any) -> None:
    form = form_of("float16-mixed", "none")
    piece = next(piece for piece in form.pieces if piece.name == "step/optimizer")
    entries = form.timeline[piece.start : piece.stop]
    assert {entry for entry in entries if entry >= 0} <= {~entry for entry in entries if entry < 0}
    kernels = {"aten._amp_foreach_non_finite_check_and_unscale_.default", "aten._amp_update_scale_.default"}
    assert kernels <= {row.name for row in form.work.rows if row.piece == "step/optimizer"}
    assert not kernels & set(form.unclassified)
