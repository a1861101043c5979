"""A site's part in a round with shared noise: one gradient sum, with a share of the noise."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, RecordDict

from lalora_app.adapter.factors import Adapter, active_names, select
from lalora_app.client.received_round import Asked, Round
from lalora_app.privacy.ledger import Reservation
from lalora_app.secagg.client_state import ClientState, check
from lalora_app.secagg.messages import bytes_of, run_and_attempt_of
from lalora_app.secagg.peers import (
    SignedKeys,
    check_directory,
    digest_of,
    identity_bytes,
    sign_keys,
)
from lalora_app.secagg.upload import OpenAttempt, Upload, open_attempt
from lalora_app.settings.names import full_path
from lalora_app.settings.run_config import Config
from lalora_app.shared_noise.lattice import Lattice, to_words
from lalora_app.shared_noise.run_constants import (
    context_of,
    lattice_of,
    noise_multiplier,
    public_constants,
)
from lalora_app.shared_noise.shares import Cohort
from lalora_app.site_files.peer_key import read_peer_key
from lalora_app.wire.messages import count_of

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

    @property
    def uid(self) -> str:
        """The name of the attempt's one release in the ledger: its keys are used once.

        A site whose state was not saved after an upload would else use the same masks and noise
        again, for another batch.
        """
        state = self.attempt.state
        return hashlib.sha256(state.mask_keys[state.client]).hexdigest()


def with_signature(reply: ConfigRecord, order: ConfigRecord, context: Context) -> ConfigRecord:
    """Return a client's public keys, signed by its site if its node config names a signing key.

    Args:
        reply: the reply to the stage "advertise".
        order: the request, with the digest of the run config that the server names.
        context: Flower's context of the client.

    Raises:
        ConfigError: if the file of the signing key cannot be used.

    Limit: without ``peer-key``, or without a digest, the reply is returned unchanged.
    """
    if "peer-key" not in context.node_config or "digest" not in order:
        return reply
    identity = read_peer_key(full_path(str(context.node_config["peer-key"])))
    run, attempt = run_and_attempt_of(order)
    keys = bytes_of(reply, "mask-key"), bytes_of(reply, "cipher-key")
    number = count_of(order, "client", 0)
    signature = sign_keys(identity, run, attempt, number, *keys, bytes_of(order, "digest"))
    signed = {"identity": identity_bytes(identity), "signature": signature}
    return ConfigRecord({**reply, **signed})


def _check_peers(asked: Asked, state: ClientState) -> None:
    """Check that the clients of an attempt are pinned sites with this run config.

    A site that signs vouches for the run config that it signed, so its own entry is checked also if
    its policy pins no peers. Limit: nothing is checked at a site without a signing key.

    Raises:
        PeerError: if a client is not pinned, or has signed other keys or another run config.
    """
    conditions, identity = asked.site.policy.shared_noise, asked.site.identity
    if identity is None:
        return
    pinned = None if conditions is None else conditions.peers
    clients = [state.client] if pinned is None else list(state.mask_keys)
    entries = {
        client: SignedKeys(
            state.mask_keys[client],
            state.cipher_keys[client],
            state.identities.get(client, b""),
            state.signatures.get(client, b""),
        )
        for client in clients
    }
    run, attempt = asked.request.run, asked.request.attempt
    own = identity_bytes(identity)
    check_directory(pinned or frozenset(), own, run, attempt, _digest(asked.config), entries)


def _digest(config: Config) -> bytes:
    return digest_of(public_constants(config))


def open_shared(asked: Asked, content: RecordDict, context: Context) -> SharedPart:
    """Return the attempt of a checked request, before any budget is reserved.

    Raises:
        StageError: if a stage is missing or wrong, the attempt has another number of colluding
            clients than the run, or the site's policy pins peers and a client is none of them.
        PolicyError: if the site's policy asks for more honest clients.
    """
    colluding = asked.config.privacy.colluding
    attempt = open_attempt(content, context, asked.request)
    _check_peers(asked, attempt.state)
    check(attempt.colluding == colluding, f"the attempt must have colluding={colluding}")
    cohort = Cohort.of(attempt.clients, colluding)
    asked.site.policy.check_cohort(cohort.honest, colluding)
    return SharedPart(attempt, cohort)


def lattice_for(current: Round, start: Adapter, part: SharedPart) -> Lattice:
    """Return the integers of a round, before its release is reserved.

    Raises:
        ConfigError: if a sum needs integers that are too large, or no noise is enough.
    """
    entries = sum(array.size for array in select(start, current.sent).values())
    return lattice_of(current.config, entries, part.cohort, noise_multiplier(current.config))


def shared_upload(
    current: Round,
    start: Adapter,
    part: SharedPart,
    lattice: Lattice,
    reservation: Reservation,
    streams: "RandomStreams",
) -> Upload:
    """Return the masked integers of a round: the site's gradient sum and its share of the noise.

    Privacy: the release is on the ledger; the sum with its share of the noise is never seen outside
    of this function without masks. The masks of a pair cancel only if both sites have the same
    directory, run config, round and integers.
    """
    from lalora_app.private_step.step import private_integers
    from lalora_app.private_step.views import private_views

    model, config, request = current.model, current.config, current.request
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
    context = context_of(lattice, _digest(config), request.run, request.attempt, request.round)
    return part.attempt.masked(to_words(integers, lattice.word), context)
