"""Show every image of a private batch in several random views (De et al., arXiv:2204.13650).

The views of an image are rows of one example, as the windows of an attention layer are: its
gradient is the mean over its views, and is clipped once. So k views leave the sensitivity at C.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from lalora_app.data.encoding import Batch, Encoded, Indices
from lalora_app.private_step.step import PrivateData

_NUMBERS = 3  # random numbers of one view: mirrored or not, shift down, shift to the right
_SHARE = 8  # a view is shifted by at most 1/8 of each side


def _view(padded: np.ndarray, drawn: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return (3, height, width): the part of a padded image that three numbers in [0, 1) choose."""
    mirrored, *places = drawn
    rooms = (padded.shape[1] - height + 1, padded.shape[2] - width + 1)  # possible first pixels
    top, left = (int(place * room) for place, room in zip(places, rooms, strict=True))
    part = padded[:, top : top + height, left : left + width]
    return part[..., ::-1] if mirrored < 0.5 else part


def in_views(batch: Batch, drawn: np.ndarray) -> Batch:
    """Return each image of a batch in its views, side by side.

    A view is the image, mirrored or not, and shifted by up to 1/8 of each side; pixels beyond an
    end are reflected there. Limit: images of fewer than 8 pixels are not shifted.

    Args:
        batch: images, (examples, 3, height, width).
        drawn: (examples, views, 3) numbers in [0, 1).
    """
    images = batch.inputs.numpy()
    height, width = images.shape[2:]
    borders = [(0, 0), (0, 0), *((side // _SHARE,) * 2 for side in (height, width))]
    padded = np.pad(images, borders, mode="reflect")
    shown = [
        _view(image, numbers, height, width)
        for image, own in zip(padded, drawn, strict=True)
        for numbers in own
    ]
    return replace(batch, inputs=torch.from_numpy(np.stack(shown)), views=drawn.shape[1])


@dataclass(frozen=True)
class InViews:
    """Encoded images as private data: each is shown in random views whenever it is drawn.

    Privacy: in each batch every record gets its own random numbers, whether it is drawn or not. The
    views of a record depend on its pixels and these numbers, and on no other record. They leave
    the client in noised sums only.

    Attributes:
        data: the encoded images.
        views: number of views of an image, at least 1.
        rng: the generator of the views; it must not depend on data.
    """

    data: Encoded
    views: int
    rng: np.random.Generator

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.data)

    def micro_batches(self, indices: Indices, size: int) -> Iterator[Batch]:
        """Yield the given images in new views, in micro-batches of at most ``size`` images."""
        drawn = self.rng.random((len(self), self.views, _NUMBERS))
        for part, width in self.data.parts(indices, size):
            yield in_views(self.data.batch(part, width), drawn[part])


def private_views(data: Encoded, views: int, rng: np.random.Generator) -> PrivateData[Batch]:
    """Return a client's data for private steps: as they are, or images in random views.

    Limit: one view is the example itself, without any randomness.
    """
    return data if views == 1 else InViews(data, views, rng)
