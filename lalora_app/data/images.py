"""Decode image files to pixels; each image is handled without the others."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalora_app.data.encoded_cache import EncodedCache
from lalora_app.data.encoding import CACHE_BYTES, EncodedImages
from lalora_app.data.examples import Examples
from lalora_app.data.pixels import decoded
from lalora_app.settings.errors import DataError, first_line


def resized_side(side: int, shorter: int, resize: int) -> int:
    """Return a side, in pixels, after the shorter one is resized; rounded as torchvision."""
    return resize * side // shorter


def middle(side: int, size: int) -> int:
    """Return the first of the ``size`` middle pixels of a side (torchvision's rounding)."""
    return round((side - size) / 2)


def _image(examples: Examples, index: int) -> Any:
    """Return one image, in RGB."""
    content = examples.contents[index]
    if not isinstance(content, bytes):
        raise DataError("data.input-column", " must hold images for this model.task, not texts")
    try:
        return decoded(content, examples.white_level)
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        place, reason = examples.place(index), _reason(error, content)
        raise DataError("data.input-column", f": {place} is no readable image: {reason}") from error


def _reason(error: Exception, content: bytes) -> str:
    """Return a decoder's reason; Pillow names an object in memory if it knows no format."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"its {len(content)} bytes are damaged, or of no image format that Pillow knows"
    return first_line(error)


def _stored(image: Any, resize: int, size: int) -> np.ndarray:
    """Return the pixels of one image, (height, width, 3).

    A square that is not larger than ``resize`` is not changed. For any other image, the shorter
    side is resized and the middle square is cut out.
    """
    from PIL import Image

    if image.width == image.height <= resize:
        return np.array(image)
    width, height = (resized_side(side, min(image.size), resize) for side in image.size)
    left, top = middle(width, size), middle(height, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + size, top + size)))


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    """Return (images, 3, height, width)."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


_IMAGES = EncodedCache[EncodedImages](CACHE_BYTES)


def encode_images(examples: Examples, resize: int, size: int) -> EncodedImages:
    """Return decoded images; kept for the next call of this process.

    Small squares stay as they are, for the model's device to resize. The pixels of an image depend
    on that image alone, and on no other image of the data.

    Args:
        examples: the bytes of image files.
        resize: pixels of the shorter side before the square is cut out.
        size: pixels of the square's side.

    Raises:
        DataError: if an image cannot be read.
    """
    key = (examples.fingerprint, resize, size)
    return _IMAGES.get(key, lambda: _encode(examples, resize, size))


def _encode(examples: Examples, resize: int, size: int) -> EncodedImages:
    arrays = [_stored(_image(examples, i), resize, size) for i in range(len(examples))]
    sizes = sorted({array.shape for array in arrays})
    stacks: tuple[list[np.ndarray], ...] = tuple([] for _ in sizes)
    places = []
    for array in arrays:
        number = sizes.index(array.shape)
        places.append((number, len(stacks[number])))
        stacks[number].append(array)
    return EncodedImages(tuple(map(_stack, stacks)), examples.labels, tuple(places))
