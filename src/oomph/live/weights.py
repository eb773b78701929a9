"""The real model of a stage: the structure that was planned, with the weights that it starts from.

The structure comes from `source.build_model`, on the meta device. Its weights are those of new models as transformers makes
them, those in the model's or its parts' folders, or those that the stage before has saved. transformers reads them into a
model on the CPU, since it knows how old checkpoints name things; from there each tensor is copied into its place on the
device, children before parents and in each module parameters before buffers, as the trace has it. Only safetensors are
read: a pickle runs code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from oomph.core.forms import FormKey
from oomph.errors import UserError
from oomph.live.data.image_token import place_image_token
from oomph.live.data.templating import load_tokenizer, tokenizer_folder
from oomph.live.model import LLAVA_PROJECTOR, build, part_finder, read_config, without_adapters
from oomph.live.modeling_oomph_llava import OomphLlavaForConditionalGeneration, projector
from oomph.live.modeling_oomph_moe import OomphMoe
from oomph.live.moe import Converted, add_noise, converted_layers, make_choice_biases
from oomph.live.moe_architectures import check_same, from_matching, has_choice_bias, section_in
from oomph.live.quantization import HeldWeight
from oomph.live.reading import read_weights
from oomph.live.source import build_model, read_model_config
from oomph.recipe import Experts, Recipe, Stage, cover
from oomph.recipe.rules import parse_pattern

PLAIN_PROJECTORS = (LLAVA_PROJECTOR, "linear", "mlp1x_gelu", "identity")
"""Projectors that LLaVA's own class computes, with weights of its own form."""
_PROJECTOR, _LANGUAGE, _TOWER = "model.multi_modal_projector.", "model.language_model.", "model.vision_tower."
_ADAPTER = "default"
_PACKED = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
_SHOWN = 3


class TrainedPart(NamedTuple):
    """What one rule of a stage trains: `part` and `pattern` as the recipe has them, the learning rate, how much it is."""

    part: str
    pattern: str
    rate: float
    tensors: int
    parameters: int


class Origin(NamedTuple):
    """Weights to start from: by their names in a model without adapters, with how the model generates text."""

    tensors: dict[str, Tensor]
    generation: GenerationConfig | None


def build_stage_model(
    key: FormKey,
    recipe: Recipe,
    previous: Path | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    notify: Callable[[str], None] = lambda sentence: None,
) -> PreTrainedModel:
    """The model that a stage trains, in training mode, with what trains requiring gradients.

    Args:
        key: any key of the stage; it names the model and all that changes it.
        recipe: for where weights come from, and for the tokenizer, which says which token stands for images.
        previous: the folder that the stage before has saved; None for the first stage.
        device: where the model goes.
        seed: of what is new in the model. The generators of the process are left as they are.
        notify: told in a sentence what is noteworthy and no mistake.

    Raises:
        UserError: the model cannot be built, or its weights are missing, damaged or of another model; all of it at once.
    """
    config = read_model_config(key)
    key = _going_on(key, config, previous)
    if config.model_type == "llava":
        place_image_token(config, load_tokenizer(tokenizer_folder(recipe)))
    model = build_model(key, config)
    if previous is not None and has_choice_bias(read_config(previous)):
        make_choice_biases(model)
    layers = converted_layers(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if previous is not None:
            origin = saved_weights(model, previous, notify)
        elif recipe.weights == "random":
            origin = _new_weights(key, config, model)
        else:
            origin = _pretrained_weights(key, config, model, notify)
        dense = [layer for layer in layers if f"{layer.mixture_path}.router.weight" not in origin.tensors]
        torch.manual_seed(seed)
        _make_experts(origin.tensors, dense)
        torch.manual_seed(seed)
        _initialise_adapters(model)
    fill(model, origin.tensors, torch.device(device))
    if dense and key.experts:
        add_noise(model, Experts.model_validate_json(key.experts).noise, seed)
    if origin.generation is not None:
        model.generation_config = origin.generation
    return model


def _going_on(key: FormKey, config: PretrainedConfig, previous: Path | None) -> FormKey:
    """The key with the experts that the stage before left, where it has none of its own.

    Raises:
        UserError: experts of the stage cannot be trained, or are others than those that there are.
    """
    asked = Experts.model_validate_json(key.experts) if key.experts else section_in(config)
    if asked is not None and asked.dispatch != "dropless":
        raise UserError(
            f"experts.dispatch {asked.dispatch} is planned and not trained: its memory grows with the square of the tokens",
            "leave it out, and every token goes to its experts",
        )
    if previous is None:
        return key
    before = read_config(previous)
    found = section_in(before)
    if found is None:
        return key
    if asked is None:
        return replace(key, experts=found.model_dump_json())
    check_same(asked, found, before, str(previous))
    return key


def _make_experts(tensors: dict[str, Tensor], layers: list[Converted]) -> None:
    """Makes of the FFNs of a dense model what converted layers hold, in place: views of each weight, and new routers.

    A dense FFN's own tensors stay where it stays beside the experts.
    """
    for layer in layers:
        path, inside = layer.path, layer.mixture_path
        names = [name for name in tensors if name.startswith(f"{path}.") and name.endswith((".weight", ".bias"))]
        linears = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        parts = {name.rpartition(".")[2]: name for name in linears}
        if not layer.experts.gated:
            parts = dict(zip(("up_proj", "down_proj"), linears, strict=True))
        for part, linear in parts.items():
            for leaf, suffix in (("weight", ""), ("bias", "_bias")):
                tensor = tensors.pop(f"{linear}.{leaf}", None)
                if tensor is not None:
                    tensors[f"{inside}.experts.{part}{suffix}"] = tensor.detach().expand(layer.experts.count, *tensor.shape)
                    if layer.residual:
                        tensors[f"{path}.dense.{linear.rpartition('.')[2]}.{leaf}"] = tensor
        width = tensors[f"{inside}.experts.up_proj"].shape[2]
        tensors |= {f"{inside}.router.{name}": item for name, item in _new_router(layer, width).items()}
        if layer.residual:
            share = nn.Linear(width, 2)
            tensors |= {f"{path}.coefficient.{name}": item for name, item in share.named_parameters()}


def _new_router(layer: Converted, width: int) -> dict[str, Tensor]:
    """A router as it begins: its weight as of a new linear layer, and nothing learned about the load."""
    count = layer.experts.count
    return {"weight": nn.Linear(width, count, bias=False).weight, "choice_bias": torch.zeros(count)}


def _new_weights(key: FormKey, config: PretrainedConfig, structure: PreTrainedModel) -> Origin:
    """Weights as transformers gives them to a new model, made in float32 whatever the model is held in."""
    new = build(config, torch.float32, key.attention, device="cpu")
    return Origin(_tensors(new) | _new_projector(structure), new.generation_config)


def _new_projector(structure: PreTrainedModel) -> dict[str, Tensor]:
    """A projector with new weights as transformers gives them to linear layers; nothing for a model without one."""
    if structure.config.model_type != "llava":
        return {}
    config = structure.config
    kind = getattr(config, "projector", LLAVA_PROJECTOR)
    made = projector(kind, config.vision_config.hidden_size, config.text_config.hidden_size)
    initialise: Callable[[nn.Module], None] = structure._init_weights
    made.apply(initialise)
    named = dict(made.named_parameters(prefix=_PROJECTOR.removesuffix(".")))
    if kind != LLAVA_PROJECTOR:
        return dict(named)
    return {name.replace(".0.", ".linear_1.").replace(".2.", ".linear_2."): tensor for name, tensor in named.items()}


def _pretrained_weights(
    key: FormKey, config: PretrainedConfig, structure: PreTrainedModel, notify: Callable[[str], None]
) -> Origin:
    if key.model is not None:
        return saved_weights(structure, Path(key.model), notify)
    assert key.vision is not None
    assert key.language is not None
    problems: list[str] = []
    tower = _read(
        type(structure.base_model.vision_tower), Path(key.vision), _dtype(structure, _TOWER), problems, config.vision_config
    )
    language = _read(reader_of(config.text_config), Path(key.language), _dtype(structure, _LANGUAGE, "lm_head."), problems)
    if tower is None or language is None:
        raise _unreadable(problems)
    head = language.get_output_embeddings()
    if head.bias is not None:
        notify(f"the head of {key.language} has a bias, which LlavaForConditionalGeneration has no place for: it is left out")
    tensors = _tensors(tower, _TOWER) | _tensors(language.base_model, _LANGUAGE) | _new_projector(structure)
    return Origin({**tensors, "lm_head.weight": head.weight}, language.generation_config)


def saved_weights(structure: PreTrainedModel, folder: Path, notify: Callable[[str], None]) -> Origin:
    """The weights in a folder of the same model.

    Raises:
        UserError: they are not all there.
    """
    problems: list[str] = []
    config = read_config(folder)
    layers = converted_layers(structure)
    if section_in(config) is None and not layers and getattr(config, "projector", LLAVA_PROJECTOR) in PLAIN_PROJECTORS:
        kind: Any = type(structure)
    else:
        kind = reader_of(config)
    model = _read(kind, folder, _dtype(structure, ""), problems, notify=notify)
    if model is None:
        raise _unreadable(problems)
    tensors = _tensors(model)
    if getattr(structure.config, "projector", LLAVA_PROJECTOR) in ("linear", "mlp1x_gelu"):
        for leaf in ("weight", "bias"):
            tensors[f"{_PROJECTOR}0.{leaf}"] = tensors[f"{_PROJECTOR}linear_1.{leaf}"]
    return Origin(from_matching(tensors, layers), model.generation_config)


def reader_of(config: PretrainedConfig) -> Any:
    """What reads the weights of a folder with this configuration, by ``from_pretrained``."""
    if getattr(config, "upcycled", None) is not None:
        return OomphMoe
    if getattr(config, "projector", LLAVA_PROJECTOR) not in PLAIN_PROJECTORS:
        return OomphLlavaForConditionalGeneration
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def _read(
    kind: Any,
    folder: Path,
    dtype: torch.dtype,
    problems: list[str],
    config: PretrainedConfig | None = None,
    notify: Callable[[str], None] = lambda sentence: None,
) -> PreTrainedModel | None:
    found = read_weights(kind, folder, dtype, config)
    problems += found.problems
    if found.unused:
        notify(f"{folder} holds {len(found.unused)} weights that the model has no place for, {some(found.unused)}")
    return found.model


def _unreadable(problems: list[str]) -> UserError:
    return UserError(
        problems, "name folders with the safetensors files of these very models, or start anew with weights: random"
    )


def some(names: list[str]) -> str:
    """A few of many names."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _dtype(structure: PreTrainedModel, *prefixes: str) -> torch.dtype:
    """What the weights of a part are read in: float32 where some of them train in float32, else what the model is held in."""
    part = part_finder(structure)
    lifted = (
        parameter.dtype == torch.float32 and parameter.requires_grad and part(name) != "lora"
        for name, parameter in structure.named_parameters()
        if name.startswith(prefixes)
    )
    return torch.float32 if any(lifted) else held_dtype(structure)


def held_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that a model is held in, but for what is float32 in it for a reason of its own."""
    dtype = model.config.dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


def _tensors(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found |= dict(model.named_buffers(remove_duplicate=False))
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def _initialise_adapters(model: nn.Module) -> None:
    """Gives adapters on the meta device the values that PEFT starts them with, in host memory."""
    for path, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and any(step.startswith("lora_") for step in path.split(".")):
                empty = torch.empty_like(parameter, device="cpu")
                module._parameters[leaf] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for module in model.modules():
        reset: Any = getattr(module, "reset_lora_parameters", None)
        if reset is not None:
            reset(_ADAPTER, True)


def fill(model: nn.Module, weights: dict[str, Tensor], device: torch.device) -> None:
    """Gives each tensor of a model on the meta device memory on the device and its value, in place.

    Tied tensors stay tied, and what is not on the meta device goes to the device as it is. Weights are taken out of their
    dictionary as they are copied, so that no more of them are held than are still to come.

    Args:
        model: with adapters and quantized layers where it has some.
        weights: by the names that tensors have without adapters; cast to what the model holds them in.
        device: where the model goes.

    Raises:
        UserError: weights are missing, or of another shape.
    """
    problems = _gaps(model, weights)
    if problems:
        raise UserError(problems, "the weights are those of another model")
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for path, module in _children_first(model, ""):
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in list(tensors.items()):
                if tensor is not None:
                    source = weights.pop(without_adapters(path + leaf), tensor)
                    if id(tensor) not in made:
                        made[id(tensor)] = tensor, _real(tensor, source if tensor.is_meta else tensor, device)
                    tensors[leaf] = made[id(tensor)][1]  # type: ignore[assignment]


def _gaps(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """What of the model `weights` do not hold, in words."""
    found = {without_adapters(name): tensor for name, tensor in _tensors(model).items() if tensor.is_meta}
    missing = [name for name in found if name not in weights]
    problems = [f"{len(missing)} weights are missing: {some(missing)}"] if missing else []
    for name, tensor in found.items():
        state = getattr(tensor, "quant_state", None)
        shape = tuple(tensor.shape if state is None else state.shape)
        if name in weights and tuple(weights[name].shape) != shape:
            problems.append(f"the weight {name} is {list(weights[name].shape)}, and the model's is {list(shape)}")
    return problems


def _children_first(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield from _children_first(child, f"{prefix}{name}.")
    yield prefix, module


def _real(tensor: Tensor, source: Tensor, device: torch.device) -> Tensor:
    """A parameter or buffer with memory of its own on the device, and the value of the source."""
    if isinstance(tensor, HeldWeight):
        return _quantized(tensor, source, device)
    real = torch.empty_like(tensor, device=device, requires_grad=False)
    real.copy_(source.detach())
    return nn.Parameter(real, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else real


def _quantized(held: Any, source: Tensor, device: torch.device) -> Tensor:
    """The parameter of bitsandbytes that is held, which it makes of the source on its way to the device.

    Raises:
        UserError: bitsandbytes has no code for that on the device.
    """
    layers: Any = importlib.import_module("bitsandbytes.nn")
    state = getattr(held, "quant_state", None)
    try:
        if state is None:
            copied = source.detach().to(torch.float16, copy=True)
            parameter: Tensor = layers.Int8Params(copied, requires_grad=False, has_fp16_weights=False)
        else:
            settings = {name: getattr(held, name) for name in _PACKED}
            copied = source.detach().to(state.dtype, copy=True)
            parameter = layers.Params4bit(copied, requires_grad=False, **settings)
        return parameter.to(device)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().partition("\n")[0]
        problem = f"bitsandbytes cannot quantize weights on {device.type}, so this stage is planned and not trained: {reason}"
        raise UserError(problem, "train it on CUDA, or without quantization") from error


def trained_parts(model: PreTrainedModel, stage: Stage) -> list[TrainedPart]:
    """What a stage trains, rule by rule in the order of the recipe.

    Raises:
        UserError: the stage's rules do not cover the model's parameters.
    """
    return [
        TrainedPart(parse_pattern(text).part, text, rate, len(found), sum(parameter.numel() for _, parameter in found))
        for text, rate, found in _ruled(model, stage)
    ]


def parameter_groups(model: PreTrainedModel, stage: Stage) -> list[dict[str, Any]]:
    """What a stage trains as groups for an optimizer: one for each rule, with its learning rate.

    Where the stage decays weights, biases, norms and all else with one dimension are in a second group without decay.
    """
    groups: list[dict[str, Any]] = []
    for text, rate, found in _ruled(model, stage):
        plain = [parameter for name, parameter in found if stage.weight_decay and _is_free(name, parameter)]
        free = {id(parameter) for parameter in plain}
        decayed = [parameter for _, parameter in found if id(parameter) not in free]
        for parameters, decay in ((decayed, stage.weight_decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": text})
    return groups


def _is_free(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is never decayed. The biases of stacked experts have two dimensions."""
    return parameter.dim() < 2 or name.endswith("bias")


def _ruled(model: PreTrainedModel, stage: Stage) -> list[tuple[str, float, list[tuple[str, nn.Parameter]]]]:
    part = part_finder(model)
    named = [(name, without_adapters(name), part(name), parameter) for name, parameter in model.named_parameters()]
    cover(stage.train, [(bare, place) for _, bare, place, _ in named])
    found = []
    for text, rate in stage.train.items():
        if rate != "frozen":
            pattern = parse_pattern(text)
            covered = [(name, parameter) for name, bare, place, parameter in named if pattern.matches(bare, place)]
            found.append((text, float(rate), covered))
    return found
