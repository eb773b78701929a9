"""Saves a trained model as a plain Hugging Face folder: what transformers loads, with all that goes with it.

The folder holds the configuration, safetensors, how to generate text, the tokenizer with the chat template that was trained
with, and for models with eyes a processor that makes of pictures what training made of them. Adapters are merged into the
weights, and lie beside as PEFT saves them. What training knew beyond that is in `SETTINGS`, for `oomph chat` and `oomph eval`.

A model with experts is saved as the architecture of transformers that it is, where `moe_architectures` knows one. Else, as
with projectors below, the class comes with the folder.

LLaVA's class computes ``linear`` and ``identity`` projectors too, exactly: its activation is then ``linear``, and layers that
are not needed are identities. Any other projector needs a class of its own. Such a folder has another model type and holds
the class's code, so that transformers refuses it where running code from the folder is not allowed.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlavaProcessor, PretrainedConfig, PreTrainedModel
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from oomph.core.catalogue import find_model
from oomph.live import modeling_oomph_llava, modeling_oomph_moe
from oomph.live.adapter_folder import merged, save_adapters
from oomph.live.data.encoding import Encoded, Encoder
from oomph.live.data.samples import Sample, Turn
from oomph.live.data.vision import Vision
from oomph.live.model import LLAVA_PROJECTOR, build, without_adapters
from oomph.live.modeling_oomph_llava import OomphLlavaConfig, OomphLlavaForConditionalGeneration
from oomph.live.modeling_oomph_moe import OomphMoe, OomphMoeConfig
from oomph.live.moe import Converted, converted_layers
from oomph.live.moe_architectures import described, matching_config, to_matching
from oomph.live.reading import quiet
from oomph.live.step import IGNORED
from oomph.live.weights import PLAIN_PROJECTORS, held_dtype
from oomph.recipe import Parts, Recipe

SETTINGS = "oomph.json"
"""What the model was trained with: limits of the data, and how pictures were brought to a shape."""
SHARD = "5GB"
_SCHEMA = 1
_CODE, _EXPERTS_CODE = "modeling_oomph_llava", "modeling_oomph_moe"
_PROJECTOR = "model.multi_modal_projector."
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_VALUES = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb")
_KEPT = ("max_tokens", "image_tokens_count", "images_per_sample", "image_size", "image_aspect_ratio")


def save_model(model: PreTrainedModel, folder: Path, recipe: Recipe, encoder: Encoder, base: Path | None = None) -> None:
    """Saves a stage's model.

    Weights that train keep their precision. Frozen ones that were lifted to float32 for training alone go back to what the
    model is held in, which they came from.

    Args:
        model: as `weights.build_stage_model` made it, trained.
        folder: an empty folder, or none yet.
        recipe: for the folder that the model came from.
        encoder: of the stage's data.
        base: the folder that the stage started from, which the adapters' own folder names; None where there is none.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    form = _form_of(model)
    tensors = _in_llavas_form(_tensors(model), model, form.projector)
    config = _config(model, tensors, form)
    with quiet():
        if form.matching:
            shell = build(config, held_dtype(model), "sdpa")
            shell.config = copy.deepcopy(config)
            to_matching(tensors, form.layers)
        else:
            shell = model
        own = model.config
        try:
            model.config = model.config if form.matching else copy.deepcopy(config)
            shell.save_pretrained(folder, state_dict=tensors, max_shard_size=SHARD, save_original_format=not form.code)
        finally:
            model.config = own
        config.architectures = [type(shell).__name__]
        config.save_pretrained(folder)
        if form.code:
            _add_code(folder, form)
        _save_generation(model, encoder, folder)
        _save_processor(recipe, encoder, folder)
    settings = {"schema": _SCHEMA, "data": encoder.data.model_dump(mode="json", include=set(_KEPT))}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    adapters = save_adapters(model, folder / "adapter", base)
    _write_readme(folder, form, encoder, adapters)


class _Form(NamedTuple):
    """How a model is saved.

    Attributes:
        projector: its kind.
        layers: those with experts that `upcycle` made.
        matching: the configuration of the architecture that has such experts; None where there is none.
    """

    projector: str
    layers: list[Converted]
    matching: PretrainedConfig | None

    @property
    def code(self) -> str:
        """The module that comes with the folder; empty where transformers has the class."""
        if self.layers and not self.matching:
            return _EXPERTS_CODE
        return "" if self.projector in PLAIN_PROJECTORS else _CODE


def _form_of(model: PreTrainedModel) -> _Form:
    kind, layers = getattr(model.config, "projector", LLAVA_PROJECTOR), converted_layers(model)
    matching = matching_config(model.config, layers) if layers and kind in PLAIN_PROJECTORS else None
    return _Form(kind, layers, matching)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is saved, in host memory, by the names that it has without adapters; tied tensors are one."""
    held = held_dtype(model)
    kept = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in model._get_dtype_plan(held)]
    wrapped, copies, found = merged(model, held), dict[int, Tensor](), dict[str, Tensor]()
    for name, tensor in _persistent(model):
        bare = without_adapters(name)
        if bare in wrapped:
            found[bare] = wrapped[bare]()
        elif not any(step.startswith("lora_") for step in name.split(".")):
            lifted = tensor.dtype == torch.float32 and isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            lower = lifted and not any(pattern.search(name) for pattern in kept)
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().to("cpu", held if lower else tensor.dtype)
            found[bare] = copies[id(tensor)]
    return found


def _persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers that are saved, by all of their names."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        buffers = {leaf: item for leaf, item in module._buffers.items() if leaf not in module._non_persistent_buffers_set}
        yield from ((prefix + leaf, item) for leaf, item in (module._parameters | buffers).items() if item is not None)


def _in_llavas_form(tensors: dict[str, Tensor], model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """The tensors with a linear or an identical projector as LLaVA's own layers."""
    if kind == LLAVA_PROJECTOR or kind not in PLAIN_PROJECTORS:
        return tensors
    width = int(model.config.text_config.hidden_size)
    given = {leaf: tensors.pop(f"{_PROJECTOR}0.{leaf}", None) for leaf in ("weight", "bias")}
    dtype = held_dtype(model) if given["weight"] is None else given["weight"].dtype
    same = {"weight": torch.eye(width, dtype=dtype), "bias": torch.zeros(width, dtype=dtype)}
    for leaf, tensor in given.items():
        tensors[f"{_PROJECTOR}linear_1.{leaf}"] = same[leaf].clone() if tensor is None else tensor
        tensors[f"{_PROJECTOR}linear_2.{leaf}"] = same[leaf]
    return tensors


def _config(model: PreTrainedModel, tensors: dict[str, Tensor], form: _Form) -> Any:
    """The configuration of what is saved: as it was before training, where training changed it for itself alone."""
    config: Any = copy.deepcopy(form.matching or model.config)
    trained = {without_adapters(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    wide = any(tensor.dtype == torch.float32 for name, tensor in tensors.items() if name in trained)
    config.dtype = torch.float32 if wide else held_dtype(model)
    head, embedding = "lm_head.weight", next((name for name in tensors if name.endswith("embed_tokens.weight")), "")
    untied = head in tensors and embedding and tensors[head] is not tensors[embedding]
    for part in (config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))):
        if part is not None:
            part.use_cache = True
            if untied and getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
    if form.projector != LLAVA_PROJECTOR:
        del config.projector
        if form.projector in PLAIN_PROJECTORS:
            config.projector_hidden_act = "linear"
    for part in (config, config.get_text_config()):
        if hasattr(part, "upcycled"):
            del part.upcycled
    return config


def _add_code(folder: Path, form: _Form) -> None:
    """Gives a folder the code of a class that transformers lacks, and the configuration that asks for it."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if form.code == _EXPERTS_CODE:
        changes, names = _with_experts(content, form), (OomphMoeConfig.__name__, OomphMoe.__name__)
    else:
        changes = {"model_type": OomphLlavaConfig.model_type}
        names = OomphLlavaConfig.__name__, OomphLlavaForConditionalGeneration.__name__
    if form.projector not in PLAIN_PROJECTORS:
        changes["projector"] = form.projector
    auto = "AutoModelForCausalLM" if "vision_config" not in content else "AutoModelForImageTextToText"
    classes = {"AutoConfig": f"{form.code}.{names[0]}", auto: f"{form.code}.{names[1]}"}
    changes |= {"architectures": [names[1]], "auto_map": classes}
    path.write_text(json.dumps(content | changes, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for module in (modeling_oomph_llava, modeling_oomph_moe)[: 2 if form.code == _EXPERTS_CODE else 1]:
        source = Path(str(module.__file__))
        alone = source.read_text(encoding="utf-8").replace("from oomph.live.", "from .")
        (folder / source.name).write_text(alone, encoding="utf-8")


def _with_experts(content: dict[str, Any], form: _Form) -> dict[str, Any]:
    """What a configuration says beside that of the dense model."""
    return {
        "model_type": OomphMoeConfig.model_type,
        "dense_model_type": content["model_type"],
        "upcycled": described(form.layers),
    }


def end_tokens(encoder: Encoder, generation: GenerationConfig | None) -> list[int]:
    """The tokens that end an answer: those of the model and the tokenizer, and the one that its template ends turns with."""
    given = generation.eos_token_id if generation is not None else None
    found = [] if given is None else list(given) if isinstance(given, list) else [given]
    tokenizer = encoder.tokenizer
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    said = [encoder.encode([Sample("", (), _turns(text))], [()])[0] for text in ("Yes", "No")]
    last = {int(item.ids[item.labels != IGNORED][-1]) for item in said if isinstance(item, Encoded)}
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    vocabulary = int(encoder.config.get_text_config().vocab_size)
    return sorted({number for number in [*found, *(last & special)] if number < vocabulary})


def _turns(answer: str) -> tuple[Turn, ...]:
    return Turn("user", "Is it?"), Turn("assistant", answer)


def _save_generation(model: PreTrainedModel, encoder: Encoder, folder: Path) -> None:
    """How text is generated: as the model says, ending where answers end."""
    ends = end_tokens(encoder, model.generation_config)
    generation = copy.deepcopy(model.generation_config) or GenerationConfig()
    generation.eos_token_id = ends or None
    if generation.pad_token_id is None and ends:
        generation.pad_token_id = ends[0]
    try:
        generation.save_pretrained(folder)
    except ValueError:  # a folder may come with settings that exclude each other
        plain = GenerationConfig(eos_token_id=ends or None, pad_token_id=generation.pad_token_id)
        plain.save_pretrained(folder)


def _save_processor(recipe: Recipe, encoder: Encoder, folder: Path) -> None:
    """The tokenizer, and what makes tensors of pictures."""
    if encoder.config.model_type == "llava" and encoder.vision is not None:
        processor = _llava_processor(encoder, encoder.vision)
        processor.save_pretrained(folder)
    elif not isinstance(recipe.model, Parts):
        origin = find_model(recipe.model)
        for name in _PROCESSORS:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)
    encoder.tokenizer.save_pretrained(folder)


def _llava_processor(encoder: Encoder, vision: Vision) -> LlavaProcessor:
    """A processor that makes the same tensors and as many image tokens as training."""
    config, given = encoder.config, vision.processor
    side, patch = int(config.vision_config.image_size), int(config.vision_config.patch_size)
    pooled = str(getattr(config, "projector", "")).startswith("pool_")
    size = patch * (modeling_oomph_llava.POOL if pooled else 1)
    pads, crops = encoder.data.image_aspect_ratio == "pad", encoder.data.image_aspect_ratio == "square"
    pictures = LlavaImageProcessorPil(
        do_pad=pads,
        size={"shortest_edge": side} if crops else {"height": side, "width": side},
        do_center_crop=crops,
        crop_size={"height": side, "width": side},
        **{name: getattr(given, name) for name in _VALUES if getattr(given, name, None) is not None},
    )
    strategy = config.vision_feature_select_strategy
    tokens = vision.cost((side, side)).tokens
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=encoder.tokenizer,
        patch_size=size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=tokens - (side // size) ** 2 + (strategy == "default"),
        chat_template=encoder.tokenizer.chat_template,
    )


def _write_readme(folder: Path, form: _Form, encoder: Encoder, adapters: str) -> None:
    eyes, own = encoder.vision is not None, form.code
    model, inputs = ("AutoModelForImageTextToText", "AutoProcessor") if eyes else ("AutoModelForCausalLM", "AutoTokenizer")
    trust = ", trust_remote_code=True" if own else ""
    lines = [
        "A model trained with oomph, as transformers loads it:",
        "",
        "```python",
        f"from transformers import {model}, {inputs}",
        "",
        f'model = {model}.from_pretrained("."{trust})',
        f'inputs = {inputs}.from_pretrained(".")',
        "```",
        "",
        "Prompts are made with its chat template: `inputs.apply_chat_template(messages, add_generation_prompt=True)`.",
    ]
    if encoder.config.model_type == "llava":
        lines.append("The contents of messages are texts, with `<image>` where a picture stands.")
    if own:
        what = "experts are" if own == _EXPERTS_CODE else f"projector, {form.projector}, is"
        lines += ["", f"Its {what} in no class of transformers: `{own}.py` has one."]
    if adapters:
        lines += ["", adapters]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
