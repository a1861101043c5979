"""One image file as an upright RGB image of 8 bits; wider number types are scaled."""

import io
from typing import Any

import numpy as np

_TIFF_BITS = 258  # tag BitsPerSample
_TIFF_MEANING, _WHITE_IS_ZERO = 262, 0  # tag PhotometricInterpretation, and one of its values
_FLOAT_WHITE, _WHITE_16, _WHITE_12 = 1.0, 65535.0, 4095.0
HELP = 'name the value of white in data.white-level, such as "data.white-level=4095.0"'
_END_OF_12_BITS = 16  # 4096 / 256: upper 8 bits of the first value above 12 bits


def _has_16_bit_colours(image: Any) -> bool:
    """Tell whether an image that is not loaded yet has several channels of 16 bits."""
    arguments = image.tile[0].args if image.tile else ""
    raw_mode = arguments if isinstance(arguments, str) else arguments[0]
    return ";16" in str(raw_mode) and not _is_wide(image)


def _require_upper_bits(colours: Any, white: float) -> None:
    """Refuse 16-bit colours that end below 4096, or a white level other than 0 and 65535.

    Pillow reads only the upper 8 bits of such colours. A white level of 65535 confirms that an
    image is dark; an image that is black in these bits is accepted.

    Args:
        colours: the image in RGB, with the upper 8 bits of each value.
        white: ``data.white-level``.

    Raises:
        ValueError: with a remedy.
    """
    if white not in (0.0, _WHITE_16):
        raise ValueError(
            f"data.white-level={white:g} must be 0 or 65535 for colours of 16 bits: only their "
            "upper 8 bits are read; save it with 8 bits"
        )
    highest = int(np.asarray(colours).max())
    if not white and 0 < highest < _END_OF_12_BITS:
        raise ValueError(
            "its 16-bit colours end below 4096, as if they had 12 bits or fewer: save it with 8 "
            'bits, or, if it is dark, name "data.white-level=65535.0"'
        )


def _is_wide(image: Any) -> bool:
    """Tell whether an image has one channel of more than 8 bits, or of floats."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _wide_values(image: Any, upright: Any) -> np.ndarray:
    """Return the values of an image with one channel of more than 8 bits, (height, width).

    Raises:
        ValueError: for a TIFF whose value 0 is white. Pillow inverts such a file only if it has 8
            bits or fewer.
    """
    if getattr(image, "tag_v2", {}).get(_TIFF_MEANING) == _WHITE_IS_ZERO:
        raise ValueError("its value 0 is white (WhiteIsZero): save it with 0 as black")
    return np.asarray(upright).astype(np.float64)


def _white_of(image: Any, values: np.ndarray) -> float:
    """Return the value of white of an image's type.

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
        helps = f": {HELP}" if 0 <= low <= high < np.inf else ""
        raise ValueError(
            f"its values go from {low:g} to {high:g}, and must be from 0 to {white:g}{helps}"
        )
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def decoded(content: bytes, white: float = 0.0) -> Any:
    """Return an image file upright, in RGB with 8 bits.

    Args:
        content: the bytes of the file.
        white: the value of white in files of more than 8 bits or of floats; 0: 65535 for 16 bits,
            4095 for 12 bits, 1 for floats. Files of 8 bits are not scaled, and of colours with 16
            bits the upper 8 are taken.

    Raises:
        Exception: of many kinds, if the file cannot be read or its range is not known.
    """
    from PIL import Image, ImageOps

    image: Any = Image.open(io.BytesIO(content))
    has_16_bit_colours = _has_16_bit_colours(image)
    upright = ImageOps.exif_transpose(image)
    if _is_wide(image):
        values = _wide_values(image, upright)
        upright = _to_8_bits(values, white or _white_of(image, values))
    upright.info.pop("transparency", None)  # RGB has none; Pillow warns of one in a palette
    colours = upright.convert("RGB")
    if has_16_bit_colours:
        _require_upper_bits(colours, white)
    return colours
