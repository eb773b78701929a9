"""Turns a dense model's feed-forward networks (FFNs) into mixtures of experts.

Every expert starts as a copy of the dense FFN, as in sparse upcycling (Komatsuzaki et al., arXiv 2212.05055).
The weights of a token's experts sum to 1, so the model computes what it did, whatever its routers are, as long as no noise
is added.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from oomph.errors import UserError
from oomph.live.capacity import CapacityMixture
from oomph.live.experts import Experts as StackedExperts
from oomph.live.experts import MixtureOfExperts, Router
from oomph.live.ffn import find_ffn
from oomph.live.residual import ResidualExperts
from oomph.recipe import Experts
from oomph.recipe.schema import Layers

T = TypeVar("T")
_LAYERS_HINT = "list layer numbers, each once, or use alternate, first_half, second_half or all."


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


class Converted(NamedTuple):
    """A decoder layer with experts. Names are those without adapters.

    Attributes:
        number: of the layer.
        path: the full name of the module that took the FFN's place.
        mixture_path: the full name of the mixture, which is another where the dense FFN stays.
        mixture: the experts with their router.
        experts: the experts, without adapters around them.
        top_k: how many of them see a token.
    """

    number: int
    path: str
    mixture_path: str
    mixture: MixtureOfExperts
    experts: StackedExperts
    top_k: int

    @property
    def residual(self) -> bool:
        """Whether the dense FFN stays beside the experts."""
        return self.path != self.mixture_path


def converted_layers(model: nn.Module) -> list[Converted]:
    """The decoder layers that `upcycle` gave experts to, in the order of the layers."""
    paths = {id(module): path.replace(".base_layer", "") for path, module in model.named_modules()}
    if not any(isinstance(module, MixtureOfExperts) for module in model.modules()):
        return []
    found = []
    for number, block in enumerate(decoder_layers(model)):
        for mixture in _inside(block, MixtureOfExperts):
            around = [paths[id(module)] for module in _inside(block, ResidualExperts)]
            path = paths[id(mixture)]
            [experts], [router] = _inside(mixture, StackedExperts), _inside(mixture, Router)
            found.append(Converted(number, around[0] if around else path, path, mixture, experts, router.top_k))
    return found


def make_choice_biases(model: nn.Module) -> None:
    """Gives every router of an upcycled model a bias for its choice, on the meta device, whose values are to come."""
    for router in _inside(model, Router):
        router.choice_bias = torch.zeros(len(router.weight), dtype=torch.float32, device="meta")


def _inside(module: nn.Module, kind: type[T]) -> list[T]:
    return [item for item in module.modules() if isinstance(item, kind)]


def upcycle(model: nn.Module, experts: Experts, seed: int = 0) -> list[int]:
    """Replaces the FFNs of the chosen decoder layers by mixtures of experts, in place.

    Layers are converted one after the other, and each dense FFN is let go before the next one is copied. Nothing is
    changed where an error is raised. A model on the meta device gets its noise when it gets its weights.

    Args:
        model: a causal or a vision-language model; only its language model is converted.
        experts: the recipe's section.
        seed: of the noise, where the section has some.

    Returns:
        The numbers of the converted layers, ascending.

    Raises:
        UserError: for all problems at once.
    """
    names, counts = _conversion(model, experts)
    blocks = decoder_layers(model)
    for (number, name), count in zip(names.items(), counts, strict=True):
        dense = getattr(blocks[number], name)
        mixture: nn.Module
        if experts.dispatch == "capacity":
            mixture = CapacityMixture(dense, count, experts.capacity_factor)
        else:
            mixture = MixtureOfExperts(dense, count, experts.top_k)
        setattr(blocks[number], name, ResidualExperts(dense, mixture) if experts.residual else mixture)
        del dense
    add_noise(model, experts.noise, seed)
    return list(names)


def _conversion(model: nn.Module, experts: Experts) -> tuple[dict[int, str], list[int]]:
    """The attribute of each chosen layer's FFN, and how many experts it gets.

    Raises:
        UserError: for all problems at once.
    """
    problems: list[str] = []
    hints: list[str] = []
    blocks, numbers = nn.ModuleList(), list[int]()
    try:
        blocks = decoder_layers(model)
        numbers = expert_layers(len(blocks), experts.layers)
        counts = expert_counts(numbers, experts)
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
    return names, counts


def expert_counts(numbers: list[int], experts: Experts) -> list[int]:
    """The number of experts of each converted layer.

    Raises:
        UserError: the section lists more or fewer.
    """
    if isinstance(experts.count, int):
        return [experts.count] * len(numbers)
    if len(experts.count) != len(numbers):
        listed = f"experts.count lists {len(experts.count)} numbers of experts"
        shown = ", ".join(map(str, numbers))
        verb = "layer gets" if len(numbers) == 1 else "layers get"
        raise UserError(f"{listed}, and {len(numbers)} {verb} some: {shown}.", "list one for each of them, or give one number.")
    return experts.count


def add_noise(model: nn.Module, noise: float, seed: int) -> None:
    """Adds noise to every expert's weights, in place, so that copies differ; biases stay as they are.

    It is normal, and drawn in float32 one expert at a time, the first layer first. Nothing is done on the meta device, for
    fake tensors or without noise.

    Args:
        model: upcycled.
        noise: its standard deviation, in standard deviations of the weights that the experts are copies of.
        seed: of the generator.
    """
    if not noise:
        return
    generator = torch.Generator().manual_seed(seed)
    for layer in converted_layers(model):
        for weight in layer.experts.parameters():
            if weight.dim() < 3 or weight.is_meta or isinstance(weight, FakeTensor):
                continue
            with torch.no_grad():
                scale = noise * float(weight[0].float().std())
                for expert in weight:
                    drawn = torch.randn(expert.shape, generator=generator)
                    expert.copy_(expert.float().add_(drawn.to(expert.device), alpha=scale))


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
