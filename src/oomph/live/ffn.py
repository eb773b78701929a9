"""Finds a layer's dense feed-forward network (FFN), and what it computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from oomph.errors import UserError

_FFN_NAMES = ("mlp", "feed_forward", "ffn")
FFN_HINT = (
    "experts are made of an FFN named mlp, feed_forward or ffn that holds two Linear modules, or gate_proj, up_proj and "
    "down_proj, with sizes that are multiples of 8, and one activation without parameters."
)


class Form(NamedTuple):
    """The names of an FFN's Linear modules by part (gate_proj, up_proj, down_proj), and its activation."""

    parts: dict[str, str]
    activation: nn.Module


def find_ffn(layer: nn.Module) -> tuple[str, nn.Module]:
    """The attribute name and the module of a decoder layer's dense FFN.

    Two forms are known: plain, ``down(act(up(x)))``, and gated, ``down(act(gate(x)) * up(x))``, with or without biases.
    That the FFN's own ``forward`` is one of them is checked on a few small numbers, not assumed from the names.

    Raises:
        UserError: the layer holds experts already, or has no FFN of these forms.
    """
    kind = type(layer).__name__
    if any(name.rpartition(".")[2] == "experts" for name, _ in layer.named_modules()):
        raise UserError(f"{kind} already holds experts.", "choose layers whose FFN is dense.")
    for name in _FFN_NAMES:
        ffn = getattr(layer, name, None)
        if isinstance(ffn, nn.Module) and form_of(ffn) is not None:
            return name, ffn
    modules = ", ".join(f"{name} ({type(module).__name__})" for name, module in layer.named_modules() if name)
    raise UserError(f"{kind} has no FFN that experts can be made of; its modules are: {modules or 'none'}.", FFN_HINT)


def known_form(ffn: nn.Module) -> Form:
    """The form of a dense FFN.

    Raises:
        UserError: it is none that experts can be made of.
    """
    form = form_of(ffn)
    if form is None:
        raise UserError(f"{type(ffn).__name__} is not an FFN that experts can be made of.", FFN_HINT)
    return form


def form_of(ffn: nn.Module) -> Form | None:
    """The form of a dense FFN, or None where it is not one of the known ones."""
    linears = {name: module for name, module in ffn.named_children() if type(module) is nn.Linear}
    others = [module for module in ffn.children() if type(module) is not nn.Linear]
    if set(linears) == {"gate_proj", "up_proj", "down_proj"}:
        parts = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    elif len(linears) == 2:
        parts = dict(zip(("up_proj", "down_proj"), linears, strict=True))
    else:
        return None
    held = {id(tensor) for linear in linears.values() for tensor in linear.parameters()}
    extra = [*ffn.buffers(), *(tensor for tensor in ffn.parameters() if id(tensor) not in held)]
    if len(others) != 1 or extra or not _shapes_agree({part: linears[name] for part, name in parts.items()}):
        return None
    form = Form(parts, others[0])
    return form if _computes(ffn, form) else None


def _shapes_agree(parts: dict[str, nn.Linear]) -> bool:
    """Whether the parts fit together, and every row starts at a multiple of 16 bytes, which grouped_mm asks for."""
    up, down = parts["up_proj"], parts["down_proj"]
    gate = parts.get("gate_proj", up)
    shape = (up.out_features, up.in_features)
    agree = shape == (down.in_features, down.out_features) == (gate.out_features, gate.in_features)
    return agree and not any(size % 8 for size in shape)


def _computes(ffn: nn.Module, form: Form) -> bool:
    """Whether the FFN's own forward is its form's formula, tried with small weights in place of its own.

    Rows of many sizes show a clamp (as in transformers' DeepseekV4MLP), training mode a dropout (Starcoder2MLP).
    """
    with unset_fake_temporarily(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)

        def sample(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        tensors: dict[str, Tensor] = {}
        for part, name in form.parts.items():
            out, into = (3, 5) if part == "down_proj" else (5, 3)
            tensors[f"{name}.weight"] = sample(out, into)
            if ffn.get_submodule(name).bias is not None:
                tensors[f"{name}.bias"] = sample(out)
        rows = sample(1, 1000, 3) * torch.logspace(-1, 2, 1000, dtype=torch.float64, device="cpu")[:, None]

        def linear(part: str, value: Tensor) -> Tensor:
            name = form.parts[part]
            return nn.functional.linear(value, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

        training = ffn.training
        try:
            actual = torch.func.functional_call(ffn.train(), tensors, (rows,))
        except (RuntimeError, TypeError):
            return False
        finally:
            ffn.train(training)
        if "gate_proj" in form.parts:
            inner = form.activation(linear("gate_proj", rows)) * linear("up_proj", rows)
        else:
            inner = form.activation(linear("up_proj", rows))
        return isinstance(actual, Tensor) and torch.allclose(actual, linear("down_proj", inner))
