"""Pictures: read by their headers, decoded as they are seen, brought to the tower's shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from oomph.live.data.pictures import cut_to, decode, pad_to, read_header
from oomph.live.data.samples import BadSample

SIDES = st.integers(1, 60)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_the_right_way_up(tmp_path: Path, kind: str, orientation: int) -> None:
    image = Image.new("RGB", (40, 24), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 40, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    image.save(path, exif=exif)
    with Image.open(path) as saved:
        expected = ImageOps.exif_transpose(saved).convert("RGB")
    decoded = decode(path)
    assert read_header(path) == (decoded.height, decoded.width) == ((24, 40) if orientation < 5 else (40, 24))
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))


def test_headers_are_read_without_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for kind, options in (("jpg", {}), ("png", {}), ("webp", {}), ("gif", {}), ("tiff", {}), ("bmp", {})):
        names.append(tmp_path / f"a.{kind}")
        Image.new("RGB", (30, 20)).save(names[-1], **options)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("pixels are decoded"))
    assert [read_header(name) for name in names] == [(20, 30)] * len(names)


def test_pictures_that_are_programs_are_not_opened(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    for read in (read_header, decode):
        with pytest.raises(BadSample, match=r"'a.jpg' cannot be read: it is none of JPEG"):
            read(tmp_path / "a.jpg")


def test_a_truncated_picture_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:1500])
    with pytest.raises(BadSample, match=r"'a.jpg' cannot be read: .*truncated"):
        decode(tmp_path / "a.jpg")


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    deep = np.asarray(decode(tmp_path / "deep.png"))[..., 0]
    assert np.abs(deep.astype(int) - grey.astype(int) // 257).max() <= 1
    assert deep.min() == 0
    assert deep.max() == 255
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        path = tmp_path / f"{mode}.{'tiff' if mode == 'CMYK' else 'png'}"
        Image.new("RGBA" if mode == "P" else mode, (5, 4)).convert(mode).save(path)
        assert decode(path).mode == "RGB"
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "see-through.png", transparency=bytes([255, 128]))
    assert decode(tmp_path / "see-through.png").getpixel((0, 0)) == (10, 20, 30)


@given(width=SIDES, height=SIDES, shape=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_padding_keeps_every_pixel_and_cutting_adds_none(width: int, height: int, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(width * 61 + height).integers(1, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    padded, cut = pad_to(image, shape, (0, 0, 0)), cut_to(image, shape)
    assert (np.asarray(padded) > 0).sum() == pixels.size
    assert padded.width == width or padded.height == height
    assert cut.width == width or cut.height == height
    for made in (padded, cut):
        assert abs(made.width * shape[0] - made.height * shape[1]) <= max(shape)
    assert cut.width <= width
    assert cut.height <= height
    left, top = (width - cut.width) // 2, (height - cut.height) // 2
    assert np.array_equal(np.asarray(cut), pixels[top : top + cut.height, left : left + cut.width])


def test_padding_to_a_square_is_what_llava_does() -> None:
    image = Image.new("RGB", (30, 11), (9, 9, 9))
    padded = np.asarray(pad_to(image, (336, 336), (122, 116, 104)))
    expected = np.full((30, 30, 3), (122, 116, 104), np.uint8)
    expected[9:20] = 9
    assert np.array_equal(padded, expected)
