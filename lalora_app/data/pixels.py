"""One image file as an upright RGB image of 8 bits; wider number types are scaled."""

import io
from typing import Any

import numpy as np

_TIFF_BITS = 258  # tag BitsPerSample
_FLOAT_WHITE, _WHITE_16, _WHITE_12 = 1.0, 65535.0, 4095.0
HELP = 'name the value of white in data.white-level, such as "data.white-level=4095.0"'


def _is_wide(image: Any) -> bool:
    """Tell whether an image has one channel of more than 8 bits, or of floats."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _white_of(image: Any, values: np.ndarray) -> float:
    """Return the largest value of an image's type.

    Raises:
        ValueError: if the type does not tell which value is white.
    """
    if image.mode == "F":
        return _FLOAT_WHITE
    if image.mode == "I":
        raise ValueError(f"its 32-bit integers do not tell which value is white: {HELP}")
    if getattr(image, "tag_v2", {}).get(_TIFF_BITS) == (12,):
        return _WHITE_12
    if 0 < values.max() <= _WHITE_12:
        raise ValueError(
            f"its 16-bit values end at {values.max():g}, as if it had 12 bits or fewer: {HELP} or, "
            "for 16 bits, 65535.0"
        )
    return _WHITE_16


def _to_8_bits(values: np.ndarray, white: float) -> Any:
    """Return an image of one channel, scaled from 0 to white to the whole range of 8 bits.

    Raises:
        ValueError: if a value is outside of the range, or no number.
    """
    from PIL import Image

    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= white:  # also for NaN
        raise ValueError(f"its values go from {low:g} to {high:g}, and must be from 0 to {white:g}")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def decoded(content: bytes, white: float = 0.0) -> Any:
    """Return an image file upright, in RGB with 8 bits.

    Args:
        content: the bytes of the file.
        white: the value of white in files of more than 8 bits or of floats; 0: 65535 for 16 bits,
            4095 for 12 bits, 1 for floats. Files of 8 bits are not scaled.

    Raises:
        Exception: of many kinds, if the file cannot be read or its range is not known.
    """
    from PIL import Image, ImageOps

    image: Any = Image.open(io.BytesIO(content))
    upright = ImageOps.exif_transpose(image)
    if _is_wide(image):
        values = np.asarray(upright).astype(np.float64)
        upright = _to_8_bits(values, white or _white_of(image, values))
    return upright.convert("RGB")
