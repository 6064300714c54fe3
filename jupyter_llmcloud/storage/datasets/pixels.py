"""Images of any mode as 8-bit RGB."""

from __future__ import annotations

from typing import Any


def as_rgb(image: Any) -> Any:
    """An image of PIL as RGB, with 16 bits a pixel brought to 8. Raises ValueError where its pixels have no range.

    `convert("RGB")` by itself makes everything above 255 white. Transparency is left out, as torchvision does.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        import numpy as np
        from PIL import Image

        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "whole numbers of 32 bits" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind}, whose range is not known: save it with 8 or 16 bits")
    return image.convert("RGB")
