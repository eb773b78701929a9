"""Worst-case batches: every sample as long as the limit, every image as large as it may be."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from oomph.core.layout import Shape
from oomph.errors import UserError
from oomph.live.fake import known
from oomph.live.model import WITHOUT_CLASS_TOKEN
from oomph.live.modeling_oomph_llava import POOL

Batch = dict[str, Any]


class Images(NamedTuple):
    """How a model takes images: tokens that one becomes in the text, and the tensors of a number of images."""

    tokens: int
    inputs: Callable[[int, torch.dtype], Batch]


def images_of(config: PretrainedConfig, image_size: tuple[int, int] | None) -> Images | None:
    """How the model takes images of a size, [height, width] in pixels; none for a text model.

    Raises:
        UserError: the model's way of taking images is not known here.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    kind = config.model_type
    if kind in ("llava", "internvl", "gemma3"):
        return _fixed(config, vision)
    if kind in ("idefics3", "smolvlm"):
        return _tiled(config, vision, image_size)
    if kind in _GRIDS:
        return _grid(config, vision, image_size)
    raise UserError(
        f"how {kind} takes images is not known",
        "plan the text part alone, or use a model of one of the kinds llava, internvl, gemma3, idefics3, "
        + ", ".join(sorted(_GRIDS)),
    )


def _side(value: int | list[int] | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


def _first(config: PretrainedConfig, default: int, *names: str) -> Any:
    """The first of a configuration's settings that it has: models name the same thing in several ways."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def _fixed(config: PretrainedConfig, vision: PretrainedConfig) -> Images:
    """Images of the one size that the tower was trained for."""
    side, patch = _side(vision.image_size), _side(vision.patch_size)
    pooled = POOL if str(getattr(config, "projector", "")).startswith("pool_") else 1
    patches = (side // patch // pooled) ** 2
    if config.model_type == "gemma3":
        tokens = config.mm_tokens_per_image
    elif config.model_type == "internvl":
        tokens = int(patches * config.downsample_ratio**2)
    else:
        classed = vision.model_type not in WITHOUT_CLASS_TOKEN
        tokens = patches + classed - (config.vision_feature_select_strategy == "default")

    def inputs(images: int, dtype: torch.dtype) -> Batch:
        return {"pixel_values": torch.empty((images, 3, side, side), dtype=dtype)}

    return Images(tokens, inputs)


def _tiled(config: PretrainedConfig, vision: PretrainedConfig, image_size: tuple[int, int] | None) -> Images:
    """Idefics3 cuts an image into tiles of the tower's size and adds the whole image, made small, as one more tile."""
    side = _side(vision.image_size)
    height, width = image_size or (side * 4, side * 4)
    rows, columns = math.ceil(height / side), math.ceil(width / side)
    tiles = rows * columns + 1 if rows * columns > 1 else 1
    tokens = (side // _side(vision.patch_size)) ** 2 // config.scale_factor**2

    def inputs(images: int, dtype: torch.dtype) -> Batch:
        return {"pixel_values": torch.empty((1, images * tiles, 3, side, side), dtype=dtype)}

    return Images(tokens * tiles, inputs)


_GRIDS = {"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "paddleocr_vl", "kimi_k25"}


def _grid(config: PretrainedConfig, vision: PretrainedConfig, image_size: tuple[int, int] | None) -> Images:
    """Images of any size, cut into patches; several neighbouring patches become one token."""
    patch = _side(vision.patch_size)
    merge = _side(_first(vision, 2, "spatial_merge_size", "merge_kernel_size"))
    unit = patch * merge
    height, width = (max(unit, round(side / unit) * unit) for side in image_size or (448, 448))
    rows, columns = height // patch, width // patch
    frames = getattr(vision, "temporal_patch_size", 1)
    channels = _side(_first(vision, 3, "in_channels", "in_chans", "num_channels"))
    flat = config.model_type not in ("paddleocr_vl", "kimi_k25")

    def inputs(images: int, dtype: torch.dtype) -> Batch:
        patches = images * rows * columns
        pixels = (patches, channels * frames * patch * patch) if flat else (patches, channels, patch, patch)
        grid = torch.tensor([[1, rows, columns]] * images)
        return {"pixel_values": torch.empty(pixels, dtype=dtype), "image_grid_thw": grid}

    return Images(rows * columns // merge**2, inputs)


# Models whose rotary embedding has three positions a token (time, row, column), which the collator computes.
_THREE_POSITIONS = {"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "paddleocr_vl"}


def text_inputs(config: PretrainedConfig, shape: Shape, images: Images | None) -> dict[str, Tensor]:
    """Token ids and labels, [samples, tokens]. Samples are padded on the right, so a causal model needs no mask.

    The images' tokens stand at the beginning of the samples, as many images in each.
    """
    size = (shape.samples, shape.tokens)
    if images is None or not shape.images:
        ids = torch.empty(size, dtype=torch.long)
    else:
        ids = known(functools.partial(_token_ids, config, shape, images.tokens))
    inputs = {"input_ids": ids, "labels": torch.empty(size, dtype=torch.long)}
    if config.model_type in _THREE_POSITIONS:
        inputs["position_ids"] = torch.empty((3, *size), dtype=torch.long)
    if config.model_type == "gemma3":
        inputs["token_type_ids"] = torch.empty(size, dtype=torch.long)
    return inputs


def random_batch(config: PretrainedConfig, shape: Shape, images: Images | None, dtype: torch.dtype) -> Batch:
    """A worst-case batch with values that a real model takes: the tensors of `text_inputs` and of the images, in host memory.

    Token ids and labels are random, and none is an id that the configuration gives a meaning to, but for the images' tokens.

    Args:
        config: the model's.
        shape: of the micro-batch.
        images: how the model takes images; none for a text model.
        dtype: of the pixels.
    """
    batch: Batch = dict(text_inputs(config, shape, None))
    size = batch["input_ids"].shape
    ordinary = _ordinary_ids(config)
    for name in ("input_ids", "labels"):
        batch[name] = ordinary[torch.randint(len(ordinary), size)]
    kinds = torch.zeros(size, dtype=torch.long)
    if images is not None and shape.images:
        image_token = _image_token(config)
        kinds = (_token_ids(config, shape, images.tokens) == image_token).long()
        batch["input_ids"].masked_fill_(kinds.bool(), image_token)
        batch |= images.inputs(shape.images, dtype)
        batch["pixel_values"].normal_()
    if "position_ids" in batch:
        batch["position_ids"] = torch.arange(shape.tokens).expand(3, *size).contiguous()
    if "token_type_ids" in batch:
        batch["token_type_ids"] = kinds
    return batch


def _ordinary_ids(config: PretrainedConfig) -> Tensor:
    """Ids of the vocabulary without those that a setting names, padding for instance; all ids where nothing else is left."""
    text = config.get_text_config()
    settings = [*config.to_dict().items(), *text.to_dict().items()]
    special = {value for name, value in settings if isinstance(value, int) and name.endswith(("token_id", "token_index"))}
    ids = torch.tensor([number for number in range(text.vocab_size) if number not in special])
    return ids if len(ids) else torch.arange(text.vocab_size)


def _token_ids(config: PretrainedConfig, shape: Shape, tokens_per_image: int) -> Tensor:
    image_token = _image_token(config)
    ids = torch.zeros((shape.samples, shape.tokens), dtype=torch.long)
    if image_token == 0:
        ids += 1
    share, more = divmod(shape.images, shape.samples)
    for sample in range(shape.samples):
        ids[sample, : (share + (sample < more)) * tokens_per_image] = image_token
    return ids


def _image_token(config: PretrainedConfig) -> int:
    number: int | None = getattr(config, "image_token_id", None)
    return int(config.image_token_index) if number is None else number
