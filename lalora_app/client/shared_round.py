"""A site's part in a round with shared noise: one gradient sum, with a share of the noise."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import Context, RecordDict

from lalora_app.adapter.factors import Adapter, active_names, select
from lalora_app.client.received_round import Asked, Round
from lalora_app.privacy.ledger import Reservation
from lalora_app.secagg.client_state import check
from lalora_app.secagg.upload import OpenAttempt, Upload, open_attempt
from lalora_app.shared_noise.lattice import to_words
from lalora_app.shared_noise.run_constants import lattice_of
from lalora_app.shared_noise.shares import Cohort

if TYPE_CHECKING:
    from lalora_app.private_step.step import RandomStreams


@dataclass(frozen=True)
class SharedPart:
    """The attempt of a round with shared noise, checked by the site.

    Attributes:
        attempt: the open attempt, with the seeds of this upload's noise.
        cohort: the clients of the attempt, counted by the site in the directory of public keys.
    """

    attempt: OpenAttempt
    cohort: Cohort


def open_shared(asked: Asked, content: RecordDict, context: Context) -> SharedPart:
    """Return the attempt of a checked request, before any budget is reserved.

    Raises:
        StageError: if a stage is missing or wrong, or the attempt has another number of colluding
            clients than the run.
        PolicyError: if the site's policy asks for more honest clients.
    """
    attempt, colluding = (
        open_attempt(content, context, asked.request),
        asked.config.privacy.colluding,
    )
    check(attempt.colluding == colluding, f"the attempt must have colluding={colluding}")
    cohort = Cohort.of(attempt.clients, colluding)
    asked.site.policy.check_cohort(cohort.honest, colluding)
    return SharedPart(attempt, cohort)


def shared_upload(
    current: Round,
    start: Adapter,
    part: SharedPart,
    reservation: Reservation,
    streams: "RandomStreams",
) -> Upload:
    """Return the masked integers of a round: the site's gradient sum and its share of the noise.

    Privacy: the release is on the ledger; the sum with its share of the noise is never seen outside
    of this function without masks.
    """
    from lalora_app.private_step.step import private_integers
    from lalora_app.private_step.views import private_views

    model, config = current.model, current.config
    entries = sum(array.size for array in select(start, current.sent).values())
    lattice = lattice_of(config, entries, part.cohort, reservation.noise_multiplier)
    model.load(start, current.received.drift)
    model.engine.activate(active_names(start, current.sent))
    integers = private_integers(
        model,
        private_views(current.data, config.train.views, streams.sampling),
        reservation=reservation,
        lattice=lattice,
        seeds=part.attempt.noise_seeds,
        micro_batch=config.train.micro_batch,
        sampling=streams.sampling,
        clipping=config.privacy.clipping,
    )
    return part.attempt.masked(to_words(integers, lattice.word))
