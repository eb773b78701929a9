"""How a model takes pictures: what an image becomes in the text, how many tokens it has, and its tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, CLIPImageProcessorPil, PretrainedConfig

from oomph.errors import UserError
from oomph.live.batch import Images, images_of
from oomph.live.data.chat import ImageText
from oomph.live.data.image_token import place_image_token
from oomph.live.data.pictures import Size, cut_to, pad_to
from oomph.live.data.samples import IMAGE_TAG, BadSample
from oomph.live.data.templating import Tokenizer
from oomph.recipe import Data

_SQUARES = ("llava", "internvl", "gemma3")
_TILED = ("idefics3", "smolvlm")
_CONFIGURATIONS = ("preprocessor_config.json", "processor_config.json")
_HALF = 0.5**0.5
_NO_GEOMETRY = ("do_resize", "do_center_crop", "do_pad", "do_pan_and_scan", "crop_to_patches")


class ImageCost(NamedTuple):
    """What one image costs: tokens of the language model, patches of the vision tower."""

    tokens: int
    patches: int


class Vision:
    """A model's eyes.

    Every image becomes one shape: that of the tower, or `data.image_size`. Only where `data.image_aspect_ratio` is ``any``
    does the model's own image processor choose the shape, with as many pixels at most. In either case the processor makes
    the values. It is transformers' Pillow backend everywhere, so that an installed torchvision changes nothing.

    Attributes:
        processor: transformers' image processor.
        token_id: the model's id of an image token.
        text: how an image is written.
    """

    def __init__(self, config: PretrainedConfig, images: Images, processor: Any, tokenizer: Tokenizer, data: Data) -> None:
        """Checks that processor and tower agree.

        Raises:
            UserError: they do not, or the tokenizer or the recipe does not go with the model.
        """
        self.processor, self._images, self._how = processor, images, data.image_aspect_ratio
        self._kind: str = config.model_type
        self.token_id = int(config.image_token_id)
        self.text = _image_text(config, tokenizer)
        expected = images.inputs(1, torch.float32)
        self._patch = _side(config.vision_config.patch_size)
        self._shape = _shape(expected, self._patch)
        if self._how == "any" and self._kind in _SQUARES:
            raise UserError(
                f"data.image_aspect_ratio any is not possible with a {self._kind} model: its tower takes one shape",
                "pad and square make that shape",
            )
        made = self._fixed(Image.new("RGB", (self._shape[1], self._shape[0])))
        shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (made, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(f"the image processor makes {shapes[0]} of an image, and the model takes {shapes[1]}")
        self._cost = ImageCost(images.tokens, (self._shape[0] // self._patch) * (self._shape[1] // self._patch))

    def cost(self, size: Size) -> ImageCost:
        """What an image of a size costs.

        Raises:
            BadSample: the model's processor does not take such an image.
        """
        if self._how != "any":
            return self._cost
        smallest, largest = self._limits()
        try:
            patches = self.processor.get_number_of_image_patches(*size, {"min_pixels": smallest, "max_pixels": largest})
        except ValueError as error:
            raise BadSample([_refused(*size, error)]) from None
        return ImageCost(patches // self.processor.merge_size**2, patches)

    def tensors(self, image: Image.Image) -> dict[str, Tensor]:
        """An image's tensors in float32, as a batch of one.

        Raises:
            BadSample: the model's processor does not take such an image.
        """
        if self._how != "any":
            return self._fixed(image)
        smallest, largest = self._limits()
        size = {"shortest_edge": smallest, "longest_edge": largest}
        try:
            return _named(self.processor(images=image, size=size, return_tensors="np"))
        except ValueError as error:
            raise BadSample([_refused(image.height, image.width, error)]) from None

    def smaller_shape(self) -> Size | None:
        """Half as many pixels as images have now, (height, width); None where the tower takes one shape, or none so small."""
        step = self._patch * getattr(self.processor, "merge_size", 1)
        shape = int(self._shape[0] * _HALF) // step * step, int(self._shape[1] * _HALF) // step * step
        return None if self._kind in _SQUARES or min(shape) < step else shape

    def settings(self) -> list[Any]:
        """All that costs depend on, as plain JSON values."""
        limits = self._limits() if self._how == "any" else None
        return [self._kind, self.token_id, list(self.text), self._how, list(self._shape), list(self._cost), limits]

    def _fixed(self, image: Image.Image) -> dict[str, Tensor]:
        mean = self.processor.image_mean
        color = tuple(int(value * 255) for value in ([mean] * 3 if isinstance(mean, float) else mean))
        image = cut_to(image, self._shape) if self._how == "square" else pad_to(image, self._shape, color)  # type: ignore[arg-type]
        height, width = self._shape
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling(self.processor.resample))
        flags = {name: False for name in _NO_GEOMETRY if hasattr(self.processor, name)}
        return _named(self.processor(images=image, **flags, return_tensors="np"))

    def _limits(self) -> tuple[int, int]:
        """The fewest and the most pixels of an image of any shape."""
        largest = self._shape[0] * self._shape[1]
        return min(int(self.processor.size["shortest_edge"]), largest), largest


def open_vision(
    config: PretrainedConfig, folder: Path, tokenizer: Tokenizer, data: Data, notify: Callable[[str], None]
) -> Vision | None:
    """The eyes of a model; None for a text model.

    Args:
        config: the model's configuration.
        folder: where its image processor is described; of a model made of parts, the tower's.
        tokenizer: gets LLaVA's image tag as a token where it has none.
        data: the limits of the data.
        notify: told in a sentence where something had to be assumed.

    Raises:
        UserError: the model's way of taking images is not known, or its parts do not go together.
    """
    size = data.image_size
    images = images_of(config, (size, size) if isinstance(size, int) else None if size is None else (size[0], size[1]))
    if images is None:
        return None
    if config.model_type in _TILED:
        raise UserError(f"{config.model_type} cuts images into tiles that are named in the text, which is not prepared yet")
    if any((folder / name).is_file() for name in _CONFIGURATIONS):
        try:
            processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except Exception as error:  # each processor class fails in its own way
            raise UserError(f"transformers cannot read the image processor in {folder}: {error}") from None
    elif config.model_type in _SQUARES:
        notify(f"{folder} describes no image processor; pixels are normalised as CLIP's are")
        processor = CLIPImageProcessorPil()
    else:
        raise UserError(f"the folder {folder} describes no image processor", f"copy the model's {_CONFIGURATIONS[0]} into it")
    if config.model_type == "llava" and (displaced := place_image_token(config, tokenizer)):
        notify(f"the model has an embedding for no more tokens: {IMAGE_TAG} takes the place of the token {displaced!r}")
    return Vision(config, images, processor, tokenizer, data)


def _image_text(config: PretrainedConfig, tokenizer: Tokenizer) -> ImageText:
    """How the kind of model writes an image (the processors of transformers 5.23, each model's ``processing_*.py``)."""
    if config.model_type == "llava":
        return ImageText(IMAGE_TAG, IMAGE_TAG, IMAGE_TAG)
    token = _token(tokenizer, config.image_token_id)
    if config.model_type == "internvl":
        written = f"{tokenizer.start_image_token}{token}{tokenizer.end_image_token}"
        return ImageText(token, written, written)
    if config.model_type == "gemma3":
        begin, end = _token(tokenizer, config.boi_token_index), _token(tokenizer, config.eoi_token_index)
        written = f"\n\n{begin}{token}{end}\n\n"
        return ImageText(begin, written, written)
    begin, end = _token(tokenizer, config.vision_start_token_id), _token(tokenizer, config.vision_end_token_id)
    return ImageText(token, token, f"{begin}{token}{end}")


def _named(made: Any) -> dict[str, Tensor]:
    """The tensors that the model takes, of all that an image processor makes."""
    names = [name for name in ("pixel_values", "image_grid_thw") if name in made]
    found = {name: torch.from_numpy(np.ascontiguousarray(made[name])) for name in names}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def _refused(height: int, width: int, error: ValueError) -> str:
    return f"the image processor refuses an image of {width} × {height} pixels: {error}"


def _token(tokenizer: Tokenizer, number: int) -> str:
    token = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    if not isinstance(token, str):
        raise UserError(
            f"the tokenizer has no token {number}, which the model's configuration has for images",
            "set `tokenizer` to the folder of the model's own",
        )
    return token


def _side(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])


def _shape(expected: dict[str, Tensor], patch: int) -> Size:
    """The pixels of an image that has the tensors that are expected."""
    if "image_grid_thw" in expected:
        rows, columns = expected["image_grid_thw"][0, 1:].tolist()
        return rows * patch, columns * patch
    height, width = expected["pixel_values"].shape[-2:]
    return height, width
