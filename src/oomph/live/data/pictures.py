"""Image files: found inside their folder, judged by their headers, decoded, and brought to a shape."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from oomph.live.data.samples import BadSample

Size = tuple[int, int]
"""(height, width) in pixels."""

MAX_PIXELS = 89_478_485
"""The largest image: a quarter of a GiB at 3 bytes a pixel, Pillow's own limit (Image.MAX_IMAGE_PIXELS). A file of some
kilobytes can claim to hold any number of them."""

Image.init()
_FORMATS = tuple(
    name for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
"""Kinds of pictures, and none that are programs: Pillow hands PostScript to another program."""
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)

# Pillow only warns of an image that is up to twice as large; here it is an error, in every thread.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def locate(folder: Path, name: str) -> Path:
    """The file that a sample means, inside the folder of its images.

    Raises:
        BadSample: the name leads out of the folder, or there is no such file.
    """
    if os.path.isabs(name) or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise BadSample([f"the image {name!r} is no path inside the folder {folder}"])
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BadSample([f"the image {name!r} is a link that leads out of the folder {folder}"])
        found = path.is_file()
    except (OSError, RuntimeError) as error:
        raise BadSample([f"the image {name!r} cannot be looked up: {error}"]) from None
    if not found:
        raise BadSample([f"the image {name!r} is not in the folder {folder}"])
    return path


def read_header(path: Path) -> Size:
    """The size of an image as it is shown, without decoding it.

    Raises:
        BadSample: it is no image, it is damaged as far as its header tells, or it has too many pixels.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            # Of a PNG whose header has none, Pillow would decode all pixels to look for it behind them.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(_ORIENTATION) in _TURNED
            image.verify()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadSample([_too_large(path)]) from None
    except Exception as error:  # each of Pillow's readers fails in its own way
        raise BadSample([f"the image {path.name!r} cannot be read: {_reason(error)}"]) from None
    if width * height > MAX_PIXELS:
        raise BadSample([_too_large(path)])
    if not width or not height:
        raise BadSample([f"the image {path.name!r} has no pixels"])
    return (width, height) if turned else (height, width)


def decode(path: Path) -> Image.Image:
    """The image in RGB, the right way up.

    Raises:
        BadSample: it cannot be decoded.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample([_too_large(path)])
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadSample([_too_large(path)]) from None
    except BadSample:
        raise
    except Exception as error:  # each of Pillow's readers fails in its own way
        raise BadSample([f"the image {path.name!r} cannot be read: {_reason(error)}"]) from None


def _rgb(image: Image.Image) -> Image.Image:
    """Colours as they are seen: 16-bit greys are scaled and not clipped, palettes lose their transparency."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def pad_to(image: Image.Image, shape: Size, color: tuple[int, int, int]) -> Image.Image:
    """The whole image in the middle of a canvas of the shape's proportions, as LLaVA's ``expand2square`` does for squares."""
    height, width = shape
    canvas = (
        max(image.width, -(-image.height * width // height)),
        max(image.height, -(-image.width * height // width)),
    )
    if canvas == image.size:
        return image
    result = Image.new("RGB", canvas, color)
    result.paste(image, ((canvas[0] - image.width) // 2, (canvas[1] - image.height) // 2))
    return result


def cut_to(image: Image.Image, shape: Size) -> Image.Image:
    """The largest middle part of the image with the shape's proportions."""
    height, width = shape
    inner = (
        max(1, min(image.width, image.height * width // height)),
        max(1, min(image.height, image.width * height // width)),
    )
    left, top = (image.width - inner[0]) // 2, (image.height - inner[1]) // 2
    return image.crop((left, top, left + inner[0], top + inner[1]))


def _too_large(path: Path) -> str:
    return f"the image {path.name!r} has more than {MAX_PIXELS:,} pixels, the most that is decoded"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text and "cannot identify" not in text else f"it is none of {', '.join(_FORMATS)}"
