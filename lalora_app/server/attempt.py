"""The record of one attempt at a round, as the history keeps it, and checks of its replies."""

from collections.abc import Container, Iterable
from dataclasses import dataclass

from lalora_app.wire.messages import TrainReply
from lalora_app.wire.tensors import WireError


@dataclass(frozen=True)
class Attempt:
    """The outcome of one attempt at a round.

    Attributes:
        round: number t of the round; a failed round is attempted again under the same number.
        phase: factors that the clients sent, such as "B" or "A+B"; "head" if none.
        aggregated: whether there were enough valid replies, so that adapter and phase advanced.
        replies: number of valid replies.
        dropped: one reason per reply that was not used; without values of a client.
        upload_bytes: bytes of the tensors in one client's reply, mean over the valid replies.
        download_bytes: bytes of the tensors in one client's request, mean over the cohort.
        epsilon_max: largest ε that any client can have spent so far in this run.
        aggregation_error: error of averaging A and B separately, relative to the mean of the
            clients' products; None if only one factor was sent, or only a sum is known.
        aggregation_spectrum: largest singular values of the aggregation error.
        remaining_error: error that remains after the method's own server rule, on the same scale;
            None if the clients' products are not known.
        remaining_spectrum: largest singular values of the remaining error.
        update_cosine: mean cosine between two clients' updates; None if only a sum is known.
        seconds: time from the requests to the aggregate.
        epsilon_alone: ε of one client's uploads of the whole run, if each of them is opened; None:
            every upload has its own noise.
    """

    round: int
    phase: str
    aggregated: bool
    replies: int
    dropped: tuple[str, ...]
    upload_bytes: int
    download_bytes: int
    epsilon_max: float
    aggregation_error: float | None
    aggregation_spectrum: tuple[float, ...]
    remaining_error: float | None
    remaining_spectrum: tuple[float, ...]
    update_cosine: float | None
    seconds: float
    epsilon_alone: float | None = None


def failed_attempt(round_: int, phase: str, epsilon: float) -> Attempt:
    """Return the record of an attempt in which the run was interrupted.

    Args:
        round_: number t of the round.
        phase: factors that the clients were to send.
        epsilon: largest ε that a client can have spent.
    """
    return Attempt(
        round=round_,
        phase=phase,
        aggregated=False,
        replies=0,
        dropped=("the run was interrupted in this attempt",),
        upload_bytes=0,
        download_bytes=0,
        epsilon_max=epsilon,
        aggregation_error=None,
        aggregation_spectrum=(),
        remaining_error=None,
        remaining_spectrum=(),
        update_cosine=None,
        seconds=0.0,
    )


def require_in_cohort(node: int, cohort: Container[int]) -> None:
    """Check that a reply is from a node that was asked.

    Raises:
        WireError: if it is not.
    """
    if node not in cohort:
        raise WireError("the reply of a node that was not asked")


def weights_of(weighting: str, replies: Iterable[TrainReply]) -> list[float]:
    """Return one weight per reply: 1, or the public size of the client's data.

    Args:
        weighting: ``weighting`` of the run config.
        replies: valid replies; with "public-size" each has a size.
    """
    if weighting == "uniform":
        return [1.0 for _ in replies]
    return [float(reply.num_examples or 0) for reply in replies]


def drop_without_size(weighting: str, accepted: dict[int, TrainReply], dropped: list[str]) -> None:
    """Move the replies without a size to ``dropped`` if the weighting needs sizes."""
    if weighting == "public-size":
        for node in [n for n, reply in accepted.items() if reply.num_examples is None]:
            del accepted[node]
            dropped.append('weighting="public-size" needs a size, and the client sends none')
