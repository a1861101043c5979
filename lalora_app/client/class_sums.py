"""The round of class sums: one private release of frozen features in place of the local steps.

The gradient of an example's logit of its own class is, for a head of one Linear layer, its feature
in the row of that class and a 1 in the bias. So a private step on this logit in place of the loss,
with all examples in the batch, releases class sums, and is clipped and noised as any other step.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from lalora_app.adapter.factors import NONE, Adapter, active_names
from lalora_app.data.encoding import Encoded
from lalora_app.models.backbone import Backbone
from lalora_app.privacy.ledger import Reservation
from lalora_app.private_step.step import RandomStreams, private_gradient

# A feature with its 1 is at least this long, so the clip scales every example to this length. A
# head without bias has no 1: there a feature that is shorter stays as it is.
LENGTH = 1.0


def own_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (examples,): each example's logit of its own class."""
    return logits.gather(1, labels[:, None])[:, 0]


def run_class_sums(
    backbone: Backbone,
    data: Encoded,
    start: Adapter,
    drift: Adapter,
    *,
    micro_batch: int,
    reservation: Reservation,
    streams: RandomStreams,
) -> Adapter:
    """Return ``start`` with the client's noised class sums in place of its head.

    With φ_i the input of the head, a 1 appended, and n the number of examples, the row of class c
    is (Σ_{i in c} φ_i/‖φ_i‖ + noise)/n. The division keeps n out of the upload's size, as that by
    the expected batch does in a step.

    Args:
        backbone: the model; its adapter is overwritten.
        data: the client's n encoded examples.
        start: the adapter at the start of the round; B is zero in an honest run's first round.
        drift: the change of the frozen weights since the run began.
        micro_batch: number of examples per forward pass.
        reservation: one release of sampling rate 1, already on the ledger.
        streams: the random streams; at rate 1 every example is in the batch.

    Privacy: one release; an example moves the sums by at most 1 in L2 norm, and one whose feature
    is not finite adds nothing. Sums are in float64, so that the rounding errors of many examples
    stay far below that bound.
    """
    backbone.load(start, drift)
    backbone.engine.activate(active_names(start, NONE))
    view = copy.copy(backbone)
    view.task = replace(backbone.task, losses=own_logits)
    noised = private_gradient(
        view,
        data,
        reservation=reservation,
        clip_norm=LENGTH,
        micro_batch=micro_batch,
        streams=streams,
        sum_dtype=torch.float64,
    )
    return start | {name: sums.float().cpu().numpy() for name, sums in noised.items()}
