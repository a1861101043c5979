"""The server's side of the protocol: one `Session` per attempt of a round.

The server's stages are: collect public keys ("advertise"), forward encrypted shares ("share"), let
the strategy collect masked vectors ("train"), and collect shares to remove the masks ("unmask").
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from lalora_app.secagg import masks
from lalora_app.secagg.fixed_point import Words
from lalora_app.secagg.messages import SECAGG, Value, bytes_of, columns, mapping_of, record_of
from lalora_app.wire.messages import content_or_raise
from lalora_app.wire.tensors import WireError

ReplyReader = Callable[[ConfigRecord, int], None]  # (record of a reply, its client)


def _shares_for(client: int, shares: Mapping[int, Mapping[int, bytes]]) -> dict[int, bytes]:
    """Return the shares that the other clients encrypted for ``client``, by sender."""
    return {source: encrypted[client] for source, encrypted in shares.items() if source != client}


@dataclass
class Session:
    """The protocol of one attempt. A client that drops out at one stage is not asked again.

    Attributes:
        grid: Flower's connection to the clients.
        timeout: largest duration of a stage in seconds.
        run: name of the run.
        attempt: number of the attempt; keys are valid for one attempt.
        nodes: node id per client number.
        min_clients: smallest number of clients; with fewer the attempt fails.
        drop_reasons: one sentence per refused or missing reply.
        mask_keys: public mask key per client.
        commitments: SHA-256 of the mask seed per client.
    """

    grid: Grid
    timeout: float
    run: str
    attempt: int
    nodes: Mapping[int, int]
    min_clients: int
    drop_reasons: list[str] = field(default_factory=list)
    mask_keys: dict[int, bytes] = field(default_factory=dict)
    commitments: dict[int, bytes] = field(default_factory=dict)

    def _message(self, client: int, stage: str, values: Mapping[str, Value]) -> Message:
        order: dict[str, Value] = {"run": self.run, "attempt": self.attempt}
        content = RecordDict({SECAGG: ConfigRecord(order | dict(values))})
        return Message(
            content,
            dst_node_id=self.nodes[client],
            message_type=f"train.{stage}",
            group_id=str(self.attempt),
        )

    def _read_reply(
        self, stage: str, message: Message, read: ReplyReader, asked: Mapping[int, int]
    ) -> None:
        """Read one reply; an invalid reply is dropped and does not end the attempt."""
        try:
            record, node = record_of(content_or_raise(message)), message.metadata.src_node_id
            if node not in asked:
                raise WireError("the reply of a node that was not asked")
            read(record, asked[node])
        except WireError as error:
            self.drop_reasons.append(f"{stage}: {error}")

    def _run_stage(
        self, stage: str, values: Mapping[int, Mapping[str, Value]], read: ReplyReader
    ) -> None:
        """Send the messages of one stage and read the replies.

        Args:
            stage: name of the stage.
            values: fields of the message per client.
            read: function that reads one reply.
        """
        messages = [self._message(client, stage, own) for client, own in values.items()]
        replies = list(self.grid.send_and_receive(messages, timeout=self.timeout))
        asked = {self.nodes[client]: client for client in values}
        for message in replies:
            self._read_reply(stage, message, read, asked)
        if (missing := len(messages) - len(replies)) > 0:
            self.drop_reasons.append(f"{stage}: {missing} did not answer in time")

    def _collect_public_keys(self) -> dict[str, Value]:
        """Stage "advertise": collect the two public keys of every client."""
        cipher_keys: dict[int, bytes] = {}

        def read(record: ConfigRecord, client: int) -> None:
            keys = bytes_of(record, "mask-key"), bytes_of(record, "cipher-key")
            self.mask_keys[client], cipher_keys[client] = keys

        self._run_stage("advertise", {client: {"client": client} for client in self.nodes}, read)
        return columns("mask-keys", self.mask_keys) | columns("cipher-keys", cipher_keys)

    def _collect_shares(self, directory: Mapping[str, Value]) -> dict[int, dict[int, bytes]]:
        """Stage "share": return the encrypted shares by sender and receiver."""
        found: dict[int, dict[int, bytes]] = {}

        def read(record: ConfigRecord, client: int) -> None:
            shares, commitment = mapping_of(record, "shares"), bytes_of(record, "seed")
            if set(shares) != set(self.mask_keys) - {client}:
                raise WireError("there must be one share for every other client")
            found[client], self.commitments[client] = shares, commitment

        self._run_stage("share", {client: directory for client in self.mask_keys}, read)
        return found

    def _has_enough(self, clients: int) -> bool:
        needed = max(self.min_clients, masks.threshold(max(len(self.mask_keys), 1)))
        if clients < needed:
            self.drop_reasons.append(
                f"{clients} of {len(self.nodes)} are left, and it takes {needed}"
            )
        return clients >= needed

    def share_secrets(self) -> dict[int, dict[str, Value]]:
        """Run the stages "advertise" and "share".

        Returns:
            Per client, the fields to add to its training request: the shares encrypted for it.
            Empty if too few clients have replied; then no client trains and no budget is spent.
        """
        directory = self._collect_public_keys()
        if not self._has_enough(len(self.mask_keys)):
            return {}
        shares = self._collect_shares(directory)
        if not self._has_enough(len(shares)):
            return {}
        return {client: columns("shares", _shares_for(client, shares)) for client in shares}

    def _collect_unmasking_shares(
        self, arrived: list[int], lost: list[int]
    ) -> dict[int, dict[int, bytes]]:
        """Stage "unmask": return one secret's shares per client, by owner and holder."""
        found: dict[int, dict[int, bytes]] = {client: {} for client in [*arrived, *lost]}

        def read(record: ConfigRecord, client: int) -> None:
            shares = mapping_of(record, "shares")
            if set(shares) != set(found):
                raise WireError("there must be one share of every client's secret")
            for owner, share in shares.items():
                found[owner][client] = share

        both: dict[str, Value] = {"arrived": arrived, "lost": lost}
        self._run_stage("unmask", {client: both for client in arrived}, read)
        return found

    def _verified_seed(self, client: int, shares: Mapping[int, bytes]) -> bytes:
        seed = masks.reconstruct_secret(shares, len(self.mask_keys))
        if hashlib.sha256(seed).digest() != self.commitments[client]:
            raise WireError("a reconstructed seed differs from its client's commitment")
        return seed

    def _verified_mask_key(self, client: int, shares: Mapping[int, bytes]) -> bytes:
        key = masks.reconstruct_secret(shares, len(self.mask_keys))
        if masks.public_key_of(key) != self.mask_keys[client]:
            raise WireError("a reconstructed mask key differs from its client's public key")
        return key

    def unmasked_sum(self, vectors: Mapping[int, Words]) -> Words:
        """Remove all masks from the sum of the masked vectors; return the sum modulo 2^32.

        The mask of every client whose vector arrived is computed from its seed. The pair masks of
        lost clients are computed from their mask keys.

        Args:
            vectors: masked vector per client.

        Raises:
            WireError: if too few vectors arrived, too few clients sent shares, or a reconstructed
                secret is wrong.

        Privacy: only the sum over the clients is revealed.
        """
        arrived, lost = sorted(vectors), sorted(set(self.commitments) - set(vectors))
        if len(arrived) < (needed := masks.threshold(len(self.mask_keys))):
            raise WireError(f"{len(arrived)} masked vectors arrived, and unmasking takes {needed}")
        shares = self._collect_unmasking_shares(arrived, lost)
        total: Words = np.add.reduce(list(vectors.values()), dtype=np.uint32)
        for client in arrived:
            total = total - masks.mask(self._verified_seed(client, shares[client]), total.size)
        for client in lost:
            key = self._verified_mask_key(client, shares[client])
            for other in arrived:
                secret = masks.shared_secret(key, self.mask_keys[other])
                total = total - masks.pair_mask(other, client, secret, total.size)
        return total
