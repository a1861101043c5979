"""The server's side of the protocol: one `Session` per attempt of a round.

The server's stages are: collect public keys ("advertise"), forward encrypted shares ("share"), let
the strategy collect masked vectors ("train"), and collect shares to remove the masks ("unmask").
`pipeline.py` decides in which wave a stage travels.
"""

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord

from lalora_app.secagg import masks, noise_seeds
from lalora_app.secagg.messages import (
    ADVERTISE,
    SHARE,
    UNMASK,
    Value,
    bytes_of,
    columns,
    directory_digest,
    mapping_of,
)
from lalora_app.secagg.waves import Part
from lalora_app.shared_noise.lattice import Words
from lalora_app.shared_noise.shares import Cohort
from lalora_app.wire.tensors import WireError


def _shares_for(client: int, shares: Mapping[int, Mapping[int, bytes]]) -> dict[int, bytes]:
    """Return the shares that the other clients encrypted for ``client``, by sender."""
    return {source: encrypted[client] for source, encrypted in shares.items() if source != client}


@dataclass
class Session:
    """The protocol of one attempt. A client that drops out at one stage is not asked again.

    Attributes:
        run: name of the run.
        attempt: number of the attempt; keys are valid for one attempt.
        nodes: node id per client number.
        min_clients: smallest number of clients; with fewer the attempt fails.
        colluding: c of a run with shared noise; None without it.
        digest: SHA-256 of the run config, which sites with signing keys sign; empty without it.
        drop_reasons: one sentence per refused or missing reply.
        mask_keys: public mask key per client.
        cipher_keys: public cipher key per client.
        identities: public signing key per client that has one.
        signatures: its signature of the other two keys.
        shares: encrypted shares by sender and receiver.
        commitments: SHA-256 of the mask seed per client.
        noise_commitments: commitment to the noise seeds per client; empty without shared noise.
        revealed: shares from the stage "unmask", by owner and holder.
        noise_revealed: shares of noise seeds from that stage, by owner and holder.
    """

    run: str
    attempt: int
    nodes: Mapping[int, int]
    min_clients: int
    colluding: int | None = None
    digest: bytes = b""
    drop_reasons: list[str] = field(default_factory=list)
    mask_keys: dict[int, bytes] = field(default_factory=dict)
    cipher_keys: dict[int, bytes] = field(default_factory=dict)
    identities: dict[int, bytes] = field(default_factory=dict)
    signatures: dict[int, bytes] = field(default_factory=dict)
    shares: dict[int, dict[int, bytes]] = field(default_factory=dict)
    commitments: dict[int, bytes] = field(default_factory=dict)
    noise_commitments: dict[int, bytes] = field(default_factory=dict)
    revealed: dict[int, dict[int, bytes]] = field(default_factory=dict)
    noise_revealed: dict[int, dict[int, bytes]] = field(default_factory=dict)

    @property
    def threshold(self) -> int:
        """The fewest vectors in a sum, also if there are still too few clients for any sum."""
        smallest = 1 if self.colluding is None else 2 + self.colluding
        return masks.threshold(max(len(self.mask_keys), smallest), self.colluding)

    @property
    def directory_digest(self) -> bytes:
        """SHA-256 of the public keys of all clients, and c."""
        return directory_digest(self.mask_keys, self.cipher_keys, self.colluding)

    def _part(
        self,
        stage: str,
        values: Mapping[int, Mapping[str, Value]],
        read: Callable[[ConfigRecord, int], None],
    ) -> Part:
        """Return one stage, from the fields per client and the function that reads a reply."""
        order: dict[str, Value] = {"run": self.run, "attempt": self.attempt}
        clients = {self.nodes[client]: client for client in values}
        records = {
            node: ConfigRecord(order | dict(values[client])) for node, client in clients.items()
        }
        return Part(
            stage, records, lambda record, node: read(record, clients[node]), self.drop_reasons
        )

    def advertise(self) -> Part:
        """Return the stage that collects the two public keys of every client."""

        def read(record: ConfigRecord, client: int) -> None:
            keys = bytes_of(record, "mask-key"), bytes_of(record, "cipher-key")
            masks.check_public_keys(keys)  # with a bad one, all others would refuse the attempt
            if "identity" in record:
                signed = bytes_of(record, "identity"), bytes_of(record, "signature")
                self.identities[client], self.signatures[client] = signed
            self.mask_keys[client], self.cipher_keys[client] = keys

        order = {"digest": self.digest} if self.digest else {}
        fields: dict[int, Mapping[str, Value]] = {c: {"client": c, **order} for c in self.nodes}
        return self._part(ADVERTISE, fields, read)

    def share(self) -> Part:
        """Return the stage that collects the encrypted shares."""

        def read(record: ConfigRecord, client: int) -> None:
            shares, commitment = mapping_of(record, "shares"), bytes_of(record, "seed")
            if set(shares) != set(self.mask_keys) - {client}:
                raise WireError("there must be one share for every other client")
            self.noise_commitments[client] = bytes_of(record, "noise")
            self.shares[client], self.commitments[client] = shares, commitment

        directory = columns("mask-keys", self.mask_keys) | columns("cipher-keys", self.cipher_keys)
        directory |= columns("identities", self.identities)
        directory |= columns("signatures", self.signatures)
        if self.colluding is not None:
            directory["colluding"] = self.colluding
        return self._part(SHARE, {client: directory for client in self.mask_keys}, read)

    def _has_enough(self, clients: int) -> bool:
        needed = max(self.min_clients, self.threshold)
        if clients < needed:
            reason = f"{clients} of {len(self.nodes)} are left, and it takes {needed}"
            self.drop_reasons.extend([] if reason in self.drop_reasons else [reason])
        return clients >= needed

    def has_keys(self) -> bool:
        """Return whether enough clients have sent public keys; if not, add a reason to the log."""
        return self._has_enough(len(self.mask_keys))

    def has_shares(self) -> bool:
        """Return whether enough clients have sent shares; if not, add a reason to the log.

        Without enough of them no client trains and no budget is spent.
        """
        return self._has_enough(len(self.shares))

    def training_fields(self) -> dict[int, dict[str, Value]]:
        """Return, per client that may train, the fields to add to its training request."""
        if not self.has_shares():
            return {}
        return {
            client: columns("shares", _shares_for(client, self.shares)) for client in self.shares
        }

    def unmask(self, arrived: Iterable[int]) -> list[Part]:
        """Return the stage that collects one secret's shares per client.

        Args:
            arrived: clients whose masked vectors arrived. Limit: too few of them give no stage.
        """
        arrived = sorted(arrived)
        if len(arrived) < self.threshold:
            self.drop_reasons.append(
                f"{len(arrived)} masked vectors arrived, and unmasking takes {self.threshold}"
            )
            return []
        lost = sorted(set(self.shares) - set(arrived))
        self.revealed = {client: {} for client in [*arrived, *lost]}
        self.noise_revealed = {client: {} for client in arrived}

        def read(record: ConfigRecord, client: int) -> None:
            shares = mapping_of(record, "shares")
            if set(shares) != set(self.revealed):
                raise WireError("there must be one share of every client's secret")
            for owner, share in shares.items():
                self.revealed[owner][client] = share
            for owner, share in mapping_of(record, "noise").items():
                self.noise_revealed.get(owner, {})[client] = share

        both: dict[str, Value] = {"arrived": arrived, "lost": lost}
        return [self._part(UNMASK, {client: both for client in arrived}, read)]

    def _verified_seed(self, client: int, shares: Mapping[int, bytes]) -> bytes:
        seed = masks.reconstruct_seed(shares, self.threshold)
        if hashlib.sha256(seed).digest() != self.commitments[client]:
            raise WireError("a reconstructed seed differs from its client's commitment")
        return seed

    def _verified_mask_key(self, client: int, shares: Mapping[int, bytes]) -> bytes:
        key = masks.reconstruct_secret(shares, self.threshold)
        if masks.public_key_of(key) != self.mask_keys[client]:
            raise WireError("a reconstructed mask key differs from its client's public key")
        return key

    def unmasked_sum(self, vectors: Mapping[int, Words], context: bytes = b"") -> Words:
        """Remove all masks from the sum of the masked vectors; return the sum modulo 2^w.

        The mask of every client whose vector arrived is computed from its seed. The pair masks of
        lost clients are computed from their mask keys.

        Args:
            vectors: masked vector per client, of words of w = 32 or 64 bits; the clients are those
                named in :meth:`unmask`.
            context: what the masks of a pair depend on beside the directory.

        Raises:
            WireError: if too few clients sent shares, or a reconstructed secret is wrong.

        Privacy: only the sum over the clients is revealed.
        """
        whole = self.directory_digest + context
        total: Words = functools.reduce(np.add, vectors.values())
        for client in vectors:
            seed = self._verified_seed(client, self.revealed[client])
            total = total - masks.mask(seed, total)
        for client in set(self.revealed) - set(vectors):
            key = self._verified_mask_key(client, self.revealed[client])
            others = {other: self.mask_keys[other] for other in vectors}
            for other, secret in masks.shared_secrets(key, others).items():
                total = total - masks.pair_mask(other, client, secret, total, whole)
        return total

    def noise_seeds(self) -> dict[int, bytes]:
        """Return the seed s_{j+1} of the superfluous noise of each client whose vector arrived.

        A client without a verified seed keeps its noise in the sum, and is named in
        ``drop_reasons``. Limit: no seeds if all noise is needed.

        Privacy: the clients decide by their own counts of missing vectors which seed they reveal.
        """
        if self.colluding is None:
            return {}
        cohort = Cohort.of(len(self.mask_keys), self.colluding)
        number = cohort.needed(cohort.clients - len(self.noise_revealed)) + 1
        if number > cohort.removable:
            return {}
        found: dict[int, bytes] = {}
        for client in self.noise_revealed:
            try:
                found[client] = self._verified_noise_seed(client, number, cohort, found.values())
            except WireError as error:
                self.drop_reasons.append(f"noise of client {client} stays in the sum: {error}")
        return found

    def _verified_noise_seed(
        self, client: int, number: int, cohort: Cohort, others: Collection[bytes]
    ) -> bytes:
        shares, committed = self.noise_revealed[client], self.noise_commitments[client]
        seed = noise_seeds.verified(shares, number, cohort, committed)
        if seed in others:
            raise WireError("two clients have one noise seed")
        return seed
