"""MoE-LLaVA's published checkpoints: read by their own names into a folder as ours, and written back.

Names and settings are those of PKU-YuanGroup/MoE-LLaVA (moellava/model/llava_arch.py, language_model/*.py,
multimodal_encoder/*.py, multimodal_projector/builder.py) with the experts of DeepSpeed 0.9.5 (deepspeed/moe/layer.py,
sharded_moe.py): dense models of its second stage, and models with experts of its third. Language models are those that
transformers has the architecture of: Phi, StableLM 2, Mistral, Llama and Qwen1.5.

Every tensor keeps its values and its precision. Two things are otherwise than in the published code when such a model runs:
no token is dropped, and the second expert is the second most likely one, where DeepSpeed adds noise to the choice.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from oomph.core.catalogue import find_model
from oomph.errors import UserError
from oomph.live.data.encoding import Encoder
from oomph.live.data.templating import choose_template, load_tokenizer
from oomph.live.data.vision import open_vision
from oomph.live.export import save_model
from oomph.live.model import build, compose_llava, read_config
from oomph.live.moe import Converted, converted_layers, upcycle
from oomph.live.reading import quiet, read_weights
from oomph.live.source import set_projector
from oomph.live.weights import some
from oomph.recipe import Experts, Recipe

_LANGUAGES = {"phi": "phi", "stablelm": "stablelm", "mistral": "mistral", "qwen1_5": "qwen2", "llama": "llama", "": "llama"}
_RENAMED = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}
_ROTARY = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_PROJECTORS = re.compile(r"linear|identity|mlp[1-9][0-9]?x_gelu")
_NOT_WEIGHTS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|position_ids$")
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
_THEIR_TOWER = "model.image_tower.image_tower.vision_model."
_TOWER, _PROJECTOR, _LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
_SHARD_BYTES = 5 * 10**9
_HINT = "convert reads folders that MoE-LLaVA's finetune.sh and finetune_moe.sh write"


class Published(NamedTuple):
    """What the configuration of a published checkpoint says.

    Attributes:
        tower: the name of the vision tower.
        config: of the model as transformers composes it.
        projector: its kind.
        experts: None for a dense model.
        dtype: of the weights but the gates.
    """

    tower: Path
    config: PretrainedConfig
    projector: str
    experts: Experts | None
    dtype: torch.dtype


def read_published(folder: Path, tower: str | None = None) -> Published:
    """Reads the configuration of a published checkpoint.

    Args:
        folder: with MoE-LLaVA's ``config.json``.
        tower: the vision tower: a folder or a name that recipes may use; else the one that the configuration names.

    Raises:
        UserError: for all that cannot be read or has no counterpart at once.
    """
    try:
        content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, settings = str(content["model_type"]), dict(content.get("moe") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is no configuration of MoE-LLaVA: {error}", _HINT) from None
    named, projector = tower or content.get("mm_image_tower"), str(content.get("image_projector_type", "linear"))
    problems = []
    language = _LANGUAGES.get(kind.removeprefix("moe_").removeprefix("llava").removeprefix("_"))
    if "llava" not in kind or language is None:
        problems.append(f"{folder} is of type {kind}, whose language model transformers has no architecture for")
    if named is None:
        problems.append(f"{folder} names no mm_image_tower")
    if content.get("mm_video_tower"):
        problems.append(f"{folder} has a video tower, which is not supported")
    if _PROJECTORS.fullmatch(projector) is None:
        problems.append(f"{folder} has a projector of kind {projector}, of which there is none here")
    if problems or language is None or named is None:
        raise UserError(problems, _HINT)
    place = find_model(named)
    feature = "drop-first" if content.get("mm_vision_select_feature", "patch") == "patch" else "full"
    layer = int(content.get("mm_vision_select_layer", -2))
    config = compose_llava(read_config(place), _text(content, language), layer, feature, projector)
    text = str(content.get("torch_dtype") or content.get("dtype") or "float32").removeprefix("torch.")
    return Published(place, config, projector, _experts(kind, settings, folder), getattr(torch, text))


def _text(content: dict[str, Any], kind: str) -> PretrainedConfig:
    made: type[PretrainedConfig] = CONFIG_MAPPING[kind]
    known = {*made().to_dict(), *_ROTARY} - {"model_type", "architectures", "dtype", "transformers_version", "rope_parameters"}
    renamed = {_RENAMED.get(name, name): value for name, value in content.items()}
    return made.from_dict({name: value for name, value in renamed.items() if name in known and value is not None})


def _experts(kind: str, settings: dict[str, Any], folder: Path) -> Experts | None:
    """The recipe's section for what DeepSpeed's layers were made with.

    Raises:
        UserError: that is not there.
    """
    if not kind.startswith("moe_"):
        return None
    try:
        layers, counts = list(settings["moe_layers_idx"]), list(settings["num_experts"])
        counts = counts * len(layers) if len(counts) == 1 else counts
        top_k, residual = int(settings["top_k_experts"]), bool(settings.get("use_residual", False))
        if counts and not 1 <= top_k <= min(counts):
            raise UserError(f"{folder / 'config.json'} sends a token to {top_k} experts of {min(counts)}")
        return Experts(count=counts, top_k=top_k, layers=layers, residual=residual)
    except (KeyError, TypeError, ValueError):
        needed = "moe_layers_idx, num_experts and top_k_experts"
        raise UserError(f"{folder / 'config.json'} does not say which layers have experts: moe needs {needed}", _HINT) from None


def convert(
    folder: Path,
    out: Path,
    tower: str | None = None,
    chat_template: str = "vicuna",
    notify: Callable[[str], None] = lambda sentence: None,
) -> None:
    """Makes of a published checkpoint a folder that every command takes, as `save_model` writes it.

    Args:
        folder: with MoE-LLaVA's ``config.json``, its tokenizer, and weights as safetensors or as PyTorch's own files. Of
            those, tensors alone are read; nothing in them can run code.
        out: an empty folder, or none yet.
        tower: the vision tower, as in `read_published`. Its weights are read where the checkpoint has none of it.
        chat_template: as `data.chat_template` of a recipe; MoE-LLaVA's Phi, StableLM and Qwen models speak ``vicuna``.
        notify: told in a sentence what is noteworthy and no mistake.

    Raises:
        UserError: the checkpoint cannot be read or is of another model than its configuration says, or `out` is not empty.
    """
    _check_empty(out)
    published = read_published(folder, tower)
    model = build(published.config, published.dtype, "sdpa")
    set_projector(model, published.dtype)
    if published.experts is not None:
        upcycle(model, published.experts)
    with quiet():  # transformers does not know the type in MoE-LLaVA's config.json
        tokenizer = load_tokenizer(folder)
    choose_template(tokenizer, chat_template)
    tensors, unused = _renamed(_open(folder), converted_layers(model), published.projector)
    if not any(name.startswith(_TOWER) for name in tensors):
        tensors |= _tower(model, published)
    if unused:
        notify(f"{folder} holds {len(unused)} weights that the model has no place for, {some(unused)}")
    _put(model, tensors, folder)
    recipe = _recipe(published, folder)
    vision = open_vision(model.config, published.tower, tokenizer, recipe.data, notify)
    save_model(model, out, recipe, Encoder(model.config, tokenizer, vision, recipe.data))
    path = out / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"dtype": str(published.dtype).removeprefix("torch.")}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder", "name one that is not there yet")


def _recipe(published: Published, folder: Path) -> Recipe:
    parts = {"vision": str(published.tower), "projector": "mlp2x_gelu", "language": str(folder)}
    length = int(published.config.get_text_config().max_position_embeddings)
    stage = {"name": "read", "train": {"language": 1e-5}, "effective_batch": 1}
    data = {"max_tokens": length, "image_aspect_ratio": "pad", "image_tokens_count": False}
    content = {"name": "published", "model": parts, "data": data, "hardware": {"gpu": "T4"}, "stages": [stage]}
    return Recipe.model_validate(content)


def _open(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder, by their names; PyTorch's files are mapped into memory and not read whole.

    Raises:
        UserError: there are none, or a file cannot be read.
    """
    found: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder} holds no weights: neither safetensors nor pytorch_model*.bin")
    for path in files:
        try:
            if path.suffix == ".bin":
                found |= torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            else:
                with safe_open(path, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{path} cannot be read as tensors alone: {reason}") from None
        except Exception as error:  # a pickle that holds anything but tensors
            raise UserError(f"{path} holds more than tensors, and is not read: {type(error).__name__}") from None
    return found


def _tower(model: nn.Module, published: Published) -> dict[str, Tensor]:
    kind: Any = type(model.get_submodule("model.vision_tower"))
    found = read_weights(kind, published.tower, published.dtype, published.config.vision_config)
    if found.model is None:
        raise UserError(found.problems, "the checkpoint has no vision tower: name a folder with one, weights included")
    return {f"{_TOWER}{name}": tensor for name, tensor in found.model.named_parameters()}


def _put(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Gives every parameter of a model on the meta device its tensor as it is.

    Raises:
        UserError: tensors are missing or of other shapes.
    """
    parameters = dict(model.named_parameters())
    missing = [name for name in parameters if name not in tensors]
    problems = [f"{folder} lacks {len(missing)} weights of the model, by the names here: {some(missing)}"] if missing else []
    for name, parameter in parameters.items():
        if name in tensors and tensors[name].shape != parameter.shape:
            has, wants = list(tensors[name].shape), list(parameter.shape)
            problems.append(f"{folder}: the weight {name} is {has}, and the model's is {wants}")
    if problems:
        raise UserError(problems, "its config.json and its weights are not of one model")
    for name in parameters:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensors.pop(name)))


def write_back(folder: Path, like: Path, out: Path) -> None:
    """Writes a model in a folder of ours as a published checkpoint: MoE-LLaVA's names, and all files but weights of `like`.

    Args:
        folder: that `convert` made, or a stage that began with one.
        like: the published checkpoint that it was.
        out: an empty folder, or none yet.

    Raises:
        UserError: the folder is of another model than the checkpoint, or cannot be read; or `out` is not empty.
    """
    _check_empty(out)
    content = json.loads((like / "config.json").read_text(encoding="utf-8"))
    projector = str(content.get("image_projector_type", "linear"))
    out.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    for name, tensor in _published(_open(folder), projector):
        if sum(item.nbytes for item in shard.values()) + tensor.nbytes > _SHARD_BYTES and shard:
            written |= _save(shard, out, len(set(written.values())))
            shard = {}
        shard[name] = tensor.contiguous()
    wanted = set(_open(like)) if _is_whole(like) else set()
    written |= _save(shard, out, len(set(written.values())))
    strange = sorted(name for name in wanted ^ set(written) if not _NOT_WEIGHTS.search(name)) if wanted else []
    if strange:
        shutil.rmtree(out)
        raise UserError(f"{folder} is of another model than {like}: {some(strange)}", "name the checkpoint that it was made of")
    sizes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    index = {"metadata": {"total_size": sizes}, "weight_map": written}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in like.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(path, out / path.name)


# Names.

_EXPERT = re.compile(r"deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(\w+)\.(weight|bias)")
_MLP = re.compile(r"(model\.layers\.(\d+)\.mlp\.)(.+)")
_THEIR_PROJECTOR = "model.mm_projector.image_spatial_proj."
_LANGUAGE_NAMES = ("model.layers.", "model.embed_tokens.", "model.norm.", "model.final_layernorm.")
_PLAIN = {"fc1": "up_proj", "fc2": "down_proj"}
_LLAVA = {"0.": "linear_1.", "2.": "linear_2."}


def _renamed(tensors: dict[str, Tensor], layers: list[Converted], projector: str) -> tuple[dict[str, Tensor], list[str]]:
    """Published tensors by our names, experts stacked, and the names of those that have none; `tensors` is emptied."""
    places = {layer.number: layer for layer in layers}
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    unused = []
    for name in sorted(tensors):
        tensor, match = tensors.pop(name), _MLP.fullmatch(name)
        layer = places.get(int(match[2])) if match else None
        expert = _EXPERT.fullmatch(match[3]) if match else None
        if _NOT_WEIGHTS.search(name):
            continue
        if layer is not None and expert is not None:
            part = expert[2] if layer.experts.gated else _PLAIN.get(expert[2], expert[2])
            stacked = f"{layer.mixture_path}.experts.{part}{'_bias' * (expert[3] == 'bias')}"
            stacks.setdefault(stacked, {})[int(expert[1])] = tensor
        elif expert is None and (ours := _our_name(name, layer, projector)):
            found[ours] = tensor
        else:
            unused.append(name)
    for name, experts in stacks.items():
        found[name] = torch.stack([experts[number] for number in sorted(experts)])
    return found, unused


def _our_name(name: str, layer: Converted | None, projector: str) -> str:
    """Our name for a published tensor that is no expert's; empty where there is none."""
    if name.startswith(_THEIR_TOWER):
        return _TOWER + name.removeprefix(_THEIR_TOWER)
    if name.startswith(_THEIR_PROJECTOR):
        rest = name.removeprefix(_THEIR_PROJECTOR)
        if projector == "mlp2x_gelu":
            rest = _LLAVA.get(rest[:2], rest[:2]) + rest[2:]
        return _PROJECTOR + ("0." if projector == "linear" else "") + rest
    if name.startswith("lm_head."):
        return name
    match = _MLP.fullmatch(name)
    if layer is not None and match is not None:
        first, _, rest = match[3].partition(".")
        if match[3] == "deepspeed_moe.gate.wg.weight":
            return f"{layer.mixture_path}.router.weight"
        inside = {"mlp": "dense", "coefficient": "coefficient"}.get(first) if layer.residual else None
        return f"{layer.path}.{inside}.{rest}" if inside else ""
    return name.replace("model.", _LANGUAGE, 1) if name.startswith(_LANGUAGE_NAMES) else ""


_SAVED = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), _LANGUAGE),
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), _TOWER),
    (re.compile(r"^multi_modal_projector\."), _PROJECTOR),
)
"""LLaVA's names in files, which are older than those of its modules."""
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _published(tensors: dict[str, Tensor], projector: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in a folder of ours by their published names, experts one by one; `tensors` is emptied."""
    plain = not any(name.endswith((".experts.gate_proj", ".mlp.gate_proj.weight", ".w1.weight")) for name in tensors)
    for given in sorted(tensors):
        tensor, name = tensors.pop(given), given
        for pattern, ours in _SAVED:
            name = pattern.sub(ours, name)
        if name.startswith(_TOWER):
            yield _THEIR_TOWER + name.removeprefix(_TOWER), tensor
        elif name.startswith(_PROJECTOR):
            if their := _their_projector(name.removeprefix(_PROJECTOR), projector):
                yield their, tensor
        elif name.startswith(_LANGUAGE):
            yield from _their_language(name.removeprefix(_LANGUAGE), tensor, plain)
        else:
            yield name, tensor


def _their_projector(name: str, kind: str) -> str:
    """The published name of a projector's tensor; empty for a layer that a folder has for the sake of LLaVA's class alone."""
    if kind in ("linear", "identity"):
        return _THEIR_PROJECTOR + name.removeprefix("linear_1.") if kind == "linear" and "linear_1." in name else ""
    for theirs, ours in _LLAVA.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    return _THEIR_PROJECTOR + name


def _their_language(name: str, tensor: Tensor, plain: bool) -> Iterator[tuple[str, Tensor]]:
    """A tensor of the language model by its published names."""
    name = name.replace(".mlp.mixture.", ".mlp.").replace(".mlp.dense.", ".mlp.mlp.")
    name = name.replace(".mlp.router.", ".mlp.deepspeed_moe.gate.wg.").replace(
        ".block_sparse_moe.gate.", ".mlp.deepspeed_moe.gate.wg."
    )
    name = re.sub(r"\.(mlp|block_sparse_moe)\.experts\.", ".mlp.deepspeed_moe.experts.deepspeed_experts.", name)
    head, middle, part = name.partition(".deepspeed_experts.")
    if not middle:
        yield f"model.{name}", tensor
    elif part[0].isdigit():
        expert, linear, leaf = part.split(".")
        yield f"model.{head}{middle}{expert}.{_MIXTRAL[linear]}.{leaf}", tensor
    else:
        linear, leaf = part.removesuffix("_bias"), "bias" if part.endswith("_bias") else "weight"
        if plain:
            linear = {ours: theirs for theirs, ours in _PLAIN.items()}[linear]
        for number, own in enumerate(tensor):
            yield f"model.{head}{middle}{number}.{linear}.{leaf}", own


def _is_whole(folder: Path) -> bool:
    return any(True for pattern in _WEIGHTS[:2] for _ in folder.glob(pattern))


def _save(shard: dict[str, Tensor], out: Path, number: int) -> dict[str, str]:
    """Writes a file of tensors; returns its name by theirs."""
    path = out / f"model-{number + 1:05}.safetensors"
    save_file({name: tensor.clone() for name, tensor in shard.items()}, path, metadata={"format": "pt"})
    return dict.fromkeys(shard, path.name)
