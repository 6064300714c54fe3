"""Images as people see them: turned as the camera was held, with all of their range."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from jupyter_llmcloud.storage.datasets.pixels import as_rgb


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (b"\x00\x02\x01\x00\x00\x0b\x00\x00\x00\x01\x3f\x80\x00\x00" b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00", 1),
        (b"\x00\x02\x01\x0f\x00\x05\x00\x00\x00\x01\x00\x00\x00\x1a" b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x03\x00\x00", 2),
        (b"\x00\x01\x01\x12\x00\x02\x00\x00\x00\x01A\x00\x00\x00", 0),
        (b"\x00\x05", 0),
    ],
    ids=["a width that is a fraction", "a maker that is a number", "an orientation that is a text", "no end"],
)  # fmt: skip
def test_what_is_wrong_beside_the_pixels_of_a_picture_is_no_error_of_it(exif: bytes, turned: int) -> None:
    """To turn it, all of what the camera had written was written anew, which cannot be done with everything."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08" + exif)
    assert np.array_equal(np.asarray(as_rgb(Image.open(file))), np.rot90(pixels, -turned))


def test_a_picture_is_turned_as_pillow_turns_it() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8))
    for orientation in range(10):
        file = io.BytesIO()
        exif = picture.getexif()
        exif[0x0112] = orientation
        picture.save(file, "PNG", exif=exif)
        wanted = ImageOps.exif_transpose(Image.open(file))
        assert np.array_equal(np.asarray(as_rgb(Image.open(file))), np.asarray(wanted))


def test_a_picture_of_16_bits_is_turned_and_keeps_its_range() -> None:
    ramp = (np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4)
    picture, file = Image.fromarray(ramp), io.BytesIO()
    exif = picture.getexif()
    exif[0x0112] = 3
    picture.save(file, "PNG", exif=exif)
    assert np.array_equal(np.asarray(as_rgb(Image.open(file)))[..., 0], np.rot90(ramp // 257, 2))
