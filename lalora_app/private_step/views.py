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


def _shifts(drawn: np.ndarray, side: int) -> np.ndarray:
    """Return (views,): whole pixels from -side/8 to side/8, from numbers in [0, 1)."""
    most = side // _SHARE
    shifts: np.ndarray = np.floor(drawn * (2 * most + 1)).astype(np.int64) - most
    return shifts


def _sources(shifts: np.ndarray, side: int) -> np.ndarray:
    """Return (views, side): the image's pixel at each place of a side; reflected at its ends."""
    inside = np.abs(np.arange(side) + shifts[:, None])
    pixels: np.ndarray = side - 1 - np.abs(side - 1 - inside)
    return pixels


def in_views(batch: Batch, drawn: np.ndarray) -> Batch:
    """Return each image of a batch in its views, side by side.

    A view is the image, mirrored or not, and shifted by up to 1/8 of each side. Pixels beyond an
    end are reflected there.

    Args:
        batch: images, (examples, 3, height, width).
        drawn: (examples, views, 3) numbers in [0, 1).
    """
    examples, views = drawn.shape[:2]
    height, width = batch.inputs.shape[2:]
    mirrored, down, right = drawn.reshape(-1, _NUMBERS).T  # (examples · views,) each
    rows = _sources(_shifts(down, height), height)
    columns = _sources(_shifts(right, width), width)
    columns = np.where(mirrored[:, None] < 0.5, columns[:, ::-1], columns)
    places = (
        torch.arange(examples).repeat_interleave(views)[:, None, None, None],
        torch.arange(3)[:, None, None],
        torch.from_numpy(rows)[:, None, :, None],
        torch.from_numpy(columns)[:, None, None, :],
    )
    return replace(batch, inputs=batch.inputs[places], views=views)


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


def shown(data: Encoded, views: int, rng: np.random.Generator) -> PrivateData[Batch]:
    """Return the data of private steps: the examples, or images in ``views`` random views.

    Limit: one view is the example itself, without any randomness.
    """
    return data if views == 1 else InViews(data, views, rng)
