"""The record of one attempt at a round, as the history keeps it."""

from dataclasses import dataclass


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
        epsilon_alone: as ``epsilon_max``, if a server opens the uploads of a client whose noise is
            only a share; None with own noise.
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
