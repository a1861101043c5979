"""Pinned peers: a site signs its public keys of an attempt, and takes keys of known sites only.

The server distributes the public keys of an attempt. Without signatures it can add keys of clients
that it has made up, and none of their noise is in the sum. The signing keys (Ed25519) of the sites
are exchanged apart from the server, and named in each site's policy.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lalora_app.privacy.shared_policy import peer_text
from lalora_app.secagg.messages import StageError

_DOMAIN = b"LaLoRA, public keys of one client in one attempt, version 1"


class PeerError(StageError):
    """The directory of an attempt has a client that no pinned site vouches for."""


@dataclass(frozen=True)
class SignedKeys:
    """One client in the directory of an attempt.

    Attributes:
        mask_key: public key for the masks.
        cipher_key: public key that encrypts shares.
        identity: the site's public signing key, 32 bytes.
        signature: of :func:`sign_keys`.
    """

    mask_key: bytes
    cipher_key: bytes
    identity: bytes
    signature: bytes


def new_identity() -> Ed25519PrivateKey:
    """Return a new private signing key of a site, from the operating system's randomness."""
    return Ed25519PrivateKey.generate()


def identity_bytes(identity: Ed25519PrivateKey) -> bytes:
    """Return the public key of an identity, 32 bytes."""
    return identity.public_key().public_bytes_raw()


def public_text(identity: Ed25519PrivateKey) -> str:
    """Return the public key of an identity as one word, for the policies of the other sites."""
    return peer_text(identity_bytes(identity))


def digest_of(constants: Mapping[str, object]) -> bytes:
    """Return the SHA-256 of a run's public constants, whatever their order.

    Args:
        constants: such as the flat run config. A value counts by its ``repr``.
    """
    parts = [part for key in sorted(constants) for part in (key, repr(constants[key]))]
    return hashlib.sha256(_joined(part.encode() for part in parts)).digest()


def sign_keys(
    identity: Ed25519PrivateKey,
    run: str,
    attempt: int,
    client: int,
    mask_key: bytes,
    cipher_key: bytes,
    digest: bytes,
) -> bytes:
    """Return a site's signature of its public keys for one attempt.

    Args:
        identity: the site's private signing key.
        run: name of the run.
        attempt: number of the attempt.
        client: number of the site in the attempt.
        mask_key: its public key for the masks.
        cipher_key: its public key that encrypts shares.
        digest: SHA-256 of the run's constants, as this site received them.

    Privacy: public keys and settings only; a signature names the site.
    """
    return identity.sign(_message(run, attempt, client, mask_key, cipher_key, digest))


def check_directory(
    peers: Collection[bytes],
    own: bytes,
    run: str,
    attempt: int,
    digest: bytes,
    entries: Mapping[int, SignedKeys],
) -> None:
    """Check that every client of a directory is a different pinned site, which signed its keys.

    That the keys under the site's own number are its own is checked where the secret keys are.

    Args:
        peers: public signing keys of the other sites.
        own: the site's own public signing key.
        run: name of the run.
        attempt: number of the attempt.
        digest: SHA-256 of the run's constants, as this site received them.
        entries: keys and signature per client number.

    Raises:
        PeerError: if the site itself is missing, an identity is not pinned or occurs twice, or a
            signature is not of these keys, this client number, attempt, run and digest.

    Limit: the site alone passes; the number of clients is checked elsewhere.

    Privacy: a made-up client is refused before anything is reserved.
    """
    identities = [entry.identity for entry in entries.values()]
    _check(own in identities, "the directory must have this site's own signed keys")
    for client, entry in sorted(entries.items()):
        known = entry.identity == own or entry.identity in peers
        _check(known, f"client {client} must be one of the pinned peers")
        once = identities.count(entry.identity) == 1
        _check(once, f"client {client} must have a signing key that no other client has")
        message = _message(run, attempt, client, entry.mask_key, entry.cipher_key, digest)
        signed = _is_signed(entry.identity, entry.signature, message)
        _check(signed, f"client {client} must have signed its keys for this attempt")


def _check(holds: bool, law: str) -> None:
    if not holds:
        raise PeerError(law)


def _is_signed(identity: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, message)
    except (InvalidSignature, ValueError):  # ValueError: no key of this kind
        return False
    return True


def _message(
    run: str, attempt: int, client: int, mask_key: bytes, cipher_key: bytes, digest: bytes
) -> bytes:
    numbers = (str(number).encode() for number in (attempt, client))
    return _joined((_DOMAIN, run.encode(), *numbers, mask_key, cipher_key, digest))


def _joined(fields: Iterable[bytes]) -> bytes:
    """Return the fields, each after its length, so that no two lists of fields look the same."""
    return b"".join(len(field).to_bytes(8, "big") + field for field in fields)
