"""Images of any mode as 8-bit RGB, as people see them."""

from __future__ import annotations

from typing import Any

_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


def as_rgb(image: Any) -> Any:
    """An image of PIL as RGB, with 16 bits a pixel brought to 8. Raises ValueError where its pixels have no range.

    `convert("RGB")` by itself makes everything above 255 white. Transparency is left out, as torchvision does. Cameras
    write how they were held beside the pixels (EXIF): it is turned as they were, for training and for answering alike.
    """
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        import numpy as np
        from PIL import Image

        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "whole numbers of 32 bits" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind}, whose range is not known: save it with 8 or 16 bits")
    plain = image.convert("RGB")
    if turn is None:
        return plain
    from PIL.Image import Transpose

    return plain.transpose(Transpose[turn])


def _orientation(image: Any) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # what is wrong beside the pixels is no error of them
        return None
