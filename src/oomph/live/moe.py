"""Turns a dense model's feed-forward networks (FFNs) into mixtures of experts.

Every expert starts as a copy of the dense FFN, as in sparse upcycling (Komatsuzaki et al., arXiv 2212.05055). The router
weights of a token sum to 1, so the converted model computes what the dense one did, whatever the router. No token is
dropped and memory grows with tokens times top-k.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import transformers.integrations.moe  # noqa: F401  registers torch.ops.transformers.grouped_mm_fallback
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from oomph.errors import UserError

Layers = Literal["alternate", "first_half", "second_half", "all"] | list[int]

_FFN_NAMES = ("mlp", "feed_forward", "ffn")
_LAYERS_HINT = "list layer numbers, each once, or use alternate, first_half, second_half or all."
_FFN_HINT = (
    "experts are made of an FFN named mlp, feed_forward or ffn that holds two Linear modules, or gate_proj, up_proj and "
    "down_proj, with sizes that are multiples of 8, and one activation without parameters."
)


class _Form(NamedTuple):
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
        if isinstance(ffn, nn.Module) and _form(ffn) is not None:
            return name, ffn
    modules = ", ".join(f"{name} ({type(module).__name__})" for name, module in layer.named_modules() if name)
    raise UserError(f"{kind} has no FFN that experts can be made of; its modules are: {modules or 'none'}.", _FFN_HINT)


def expert_layers(num_layers: int, layers: Layers) -> list[int]:
    """The numbers of the layers to convert, ascending.

    Args:
        num_layers: how many decoder layers the model has.
        layers: ``alternate`` is every second layer from 0 on (the ``sparse`` mode of MoE-LLaVA,
            moellava/model/language_model/llava_phi_moe.py); where the number is odd, ``second_half`` has one layer more.

    Raises:
        UserError: a layer does not exist or is named twice, the word is unknown, or no layer is left.
    """
    half = num_layers // 2
    words = {
        "alternate": range(0, num_layers, 2),
        "first_half": range(half),
        "second_half": range(half, num_layers),
        "all": range(num_layers),
    }
    if isinstance(layers, str):
        if layers not in words:
            raise UserError(f"expert layers {layers!r} is none of {', '.join(words)}.", _LAYERS_HINT)
        chosen = list(words[layers])
    elif _whole(layers):
        chosen = sorted(layers)
    else:
        raise UserError(f"expert layers {layers!r} are not a list of whole numbers.", _LAYERS_HINT)
    problems = [] if chosen else [f"expert layers {layers!r} select none of the {num_layers} decoder layers."]
    for number in sorted(set(chosen)):
        if chosen.count(number) > 1:
            problems.append(f"layer {number} is listed {chosen.count(number)} times.")
        if not 0 <= number < num_layers:
            problems.append(f"layer {number} does not exist: the model has {num_layers} decoder layers, counted from 0.")
    if problems:
        raise UserError(problems, _LAYERS_HINT)
    return chosen


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The language model's decoder layers: never those of a vision tower.

    Raises:
        UserError: the model has no language model, or not exactly one stack of layers in it.
    """
    kind = type(model).__name__
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    if decoder is None or not isinstance(decoder.get_input_embeddings(), nn.Embedding):
        raise UserError(f"{kind} is not a transformers model with a language model.")
    stacks = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(m, GradientCheckpointingLayer) for m in module)
    }
    outermost = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise UserError(f"{kind} must have one stack of decoder layers in its language model; found: {found}.")
    return stacks[outermost[0]]


def upcycle(model: nn.Module, count: int, top_k: int, layers: Layers) -> list[int]:
    """Replaces the FFNs of the chosen decoder layers by mixtures of experts, in place.

    Layers are converted one after the other, and each dense FFN is let go before the next one is copied. Nothing is
    changed where an error is raised.

    Args:
        model: a causal or a vision-language model; only its language model is converted.
        count: experts per layer, at least 2.
        top_k: experts per token, from 2 to `count`. One is refused: its weight would be the constant 1, and the router
            would get no gradient from the loss.
        layers: see `expert_layers`.

    Returns:
        The numbers of the converted layers, ascending.

    Raises:
        UserError: for all problems at once.
    """
    problems = _count_problems(count, top_k)
    hints: list[str] = []
    blocks, numbers = nn.ModuleList(), list[int]()
    try:
        blocks = decoder_layers(model)
        numbers = expert_layers(len(blocks), layers)
    except UserError as error:
        problems += error.problems
        hints.append(error.hint)
    names: dict[int, str] = {}
    unfit: dict[str, list[int]] = {}
    for number in numbers:
        try:
            names[number], _ = find_ffn(blocks[number])
        except UserError as error:
            unfit.setdefault(error.problems[0], []).append(number)
            hints.append(error.hint)
    problems += [f"decoder layer{'s' * (len(at) > 1)} {', '.join(map(str, at))}: {text}" for text, at in unfit.items()]
    if problems:
        raise UserError(problems, next(filter(None, hints), ""))
    for number, name in names.items():
        setattr(blocks[number], name, MixtureOfExperts(getattr(blocks[number], name), count, top_k))
    return numbers


class Router(nn.Module):
    """Chooses the experts of each token: a linear map without bias, softmax, top-k, weights that sum to 1.

    Its weight is [count, hidden], initialised as ``nn.Linear`` initialises its own. Softmax and weights are float32.
    While all experts are equal, the weights do not change the output and the loss gives the router no gradient.
    """

    def __init__(
        self, hidden: int, count: int, top_k: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(count, hidden, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] to the weights (float32) and the numbers (int64) of the chosen experts, both [tokens, top_k]."""
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight)
        weights, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), chosen


class Experts(nn.Module):
    """`count` copies of a dense FFN, stacked: weights [count, out, in], biases [count, out].

    The parameters are ``up_proj``, ``down_proj`` and for a gated FFN ``gate_proj``, each with ``_bias`` where the dense one
    had a bias, on the device and in the dtype of the dense ones.
    """

    def __init__(self, dense: nn.Module, count: int) -> None:
        """Copies `dense`, and shares its activation module.

        Raises:
            UserError: `dense` is not a plain or gated FFN.
        """
        super().__init__()
        form = _form(dense)
        if form is None:
            raise UserError(f"{type(dense).__name__} is not an FFN that experts can be made of.", _FFN_HINT)
        self.count = count
        self.gated = "gate_proj" in form.parts
        self.activation = form.activation
        for part, name in form.parts.items():
            linear = dense.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self.register_parameter(part, _stack(linear.weight, count))
            self.register_parameter(f"{part}_bias", None if linear.bias is None else _stack(linear.bias, count))

    def forward(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        The (token, choice) pairs are sorted by expert, so each expert's rows are one group of a grouped matrix product.
        Under autocast the experts compute in autocast's dtype, as Linear modules do.

        Args:
            hidden: [tokens, hidden].
            weights: [tokens, top_k].
            chosen: expert numbers, [tokens, top_k].

        Returns:
            [tokens, hidden].
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self._held("up_proj").dtype
        top_k = chosen.shape[-1]
        expert, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(self.count, device=hidden.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        one_hot = (expert[:, None] == numbers).to(dtype)
        rows = hidden.to(dtype)[order // top_k]
        inner = self._linear("gate_proj" if self.gated else "up_proj", rows, ends, one_hot)
        inner = self.activation(inner)
        if self.gated:
            inner = inner * self._linear("up_proj", rows, ends, one_hot)
        out = self._linear("down_proj", inner, ends, one_hot)
        by_token = torch.empty_like(out).index_copy_(0, order, out).view(-1, top_k, out.shape[1])
        return (by_token * weights[..., None].to(dtype)).sum(dim=1)

    def _held(self, part: str) -> Tensor:
        """The weights of a part; with PEFT's adapters around them, their sum."""
        weight: Tensor = getattr(self, part)
        return weight

    def _linear(self, part: str, rows: Tensor, ends: Tensor, one_hot: Tensor) -> Tensor:
        """Each expert's linear map on its own rows: [rows, in] to [rows, out].

        The bias is added as a product with the one-hot expert numbers, [rows, count]: its gradient is then a matrix
        product too, where indexing would add thousands of rows to few addresses one by one.
        """
        weight = self._held(part)
        bias: Tensor | None = getattr(self, f"{part}_bias")
        out = _grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), ends)
        return out if bias is None else out.addmm_(one_hot, bias.to(rows.dtype))


class MixtureOfExperts(nn.Module):
    """Takes the place of a dense FFN: a `Router` and the `Experts` it chooses from."""

    def __init__(self, dense: nn.Module, count: int, top_k: int) -> None:
        super().__init__()
        self.experts = Experts(dense, count)
        like = self.experts.get_parameter("up_proj")
        self.router = Router(like.shape[2], count, top_k, like.device, like.dtype)
        self.train(dense.training)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to the same shape."""
        tokens = hidden.flatten(0, -2)
        weights, chosen = self.router(tokens)
        out: Tensor = self.experts(tokens, weights, chosen)
        return out.view(hidden.shape)


def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[rows, in] times each group's [in, out]; group `e` are the rows from ``ends[e - 1]`` to ``ends[e]`` (int32).

    torch has the grouped kernel, and the shapes that fake tensors need, for bfloat16 alone (torch 2.13,
    torch/_meta_registrations.py, _meta_grouped_mm_common). Other dtypes take the loop over groups of transformers
    (transformers 5.23, integrations/moe.py).
    """
    if rows.dtype == torch.bfloat16:
        return nn.functional.grouped_mm(rows, weight, offs=ends)
    out: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)
    return out


def _form(ffn: nn.Module) -> _Form | None:
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
    form = _Form(parts, others[0])
    return form if _computes(ffn, form) else None


def _shapes_agree(parts: dict[str, nn.Linear]) -> bool:
    """Whether the parts fit together, and every row starts at a multiple of 16 bytes, which grouped_mm asks for."""
    up, down = parts["up_proj"], parts["down_proj"]
    gate = parts.get("gate_proj", up)
    shape = (up.out_features, up.in_features)
    agree = shape == (down.in_features, down.out_features) == (gate.out_features, gate.in_features)
    return agree and not any(size % 8 for size in shape)


def _computes(ffn: nn.Module, form: _Form) -> bool:
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


def _stack(parameter: Tensor, count: int) -> nn.Parameter:
    copies = parameter.detach().expand(count, *parameter.shape).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copies, requires_grad=parameter.requires_grad)


def _count_problems(count: int, top_k: int) -> list[str]:
    if not _whole([count, top_k]):
        return [f"{count!r} experts of which {top_k!r} per token: both must be whole numbers."]
    problems = [] if count >= 2 else [f"{count} experts are too few to choose from: at least 2 are needed."]
    if top_k < 2:
        problems.append(f"{top_k} experts per token are too few: with fewer than 2 the router gets no gradient from the loss.")
    if top_k > max(count, 2):
        problems.append(f"{top_k} experts per token are more than the {count} experts.")
    return problems


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
