"""Keys and certificates of a deployment: a CA, the SuperLink's certificate, SuperNodes' keys."""

import contextlib
import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lalora_app.settings.errors import ConfigError

_CURVE = ec.SECP384R1()  # Flower takes ECDSA keys only
_CA_DAYS = 3650
_CLOCK_SKEW = timedelta(hours=1)  # a site's clock may be behind by this much
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")

Key = ec.EllipticCurvePrivateKey


def _write(path: Path, content: bytes, mode: int, *, replace: bool = False) -> None:
    """Write a file that has the given mode from its creation on."""
    if replace:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise ConfigError(f"{path} must be a new file: {error.strerror}") from error
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _private_pem(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _alternative(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not _HOST.fullmatch(host):
        raise ConfigError(f"host={host!r} must be a DNS name or an IP address")
    return x509.DNSName(host)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate(
    subject: str, issuer: str, key: Key, signer: Key, days: int, *, authority: bool
) -> x509.CertificateBuilder:
    """Return an unsigned certificate with the extensions that RFC 5280 requires."""
    now = datetime.now(UTC)
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    length = 0 if authority else None
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(authority, length), critical=True)
        .add_extension(_usage(signs_certificates=authority), critical=True)
        .add_extension(own, critical=False)
        .add_extension(signed_by, critical=False)
    )


_CA_NAME = "LaLoRA deployment CA"


def make_ca(folder: Path) -> None:
    """Write a certificate authority: ``ca.key``, secret at the server, and ``ca.crt`` for all.

    Args:
        folder: folder of the credentials; created if missing.

    Raises:
        ConfigError: if the folder already holds one of the files; a CA is never replaced.
    """
    key = ec.generate_private_key(_CURVE)
    built = _certificate(_CA_NAME, _CA_NAME, key, key, _CA_DAYS, authority=True)
    _write(folder / "ca.key", _private_pem(key), 0o600)
    signed = built.sign(key, hashes.SHA384())
    _write(folder / "ca.crt", signed.public_bytes(Encoding.PEM), 0o644)


def _authority(folder: Path) -> Key:
    file = folder / "ca.key"
    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} must be the key that `lalora credentials ca` wrote") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{file} must be the key that `lalora credentials ca` wrote")
    return key


def make_server(folder: Path, hosts: Sequence[str], days: int) -> None:
    """Write ``server.key`` and ``server.pem``, signed by the folder's CA; replaces older ones.

    Args:
        folder: folder with the files of :func:`make_ca`.
        hosts: DNS names and IP addresses of the SuperLink, as SuperNodes and users write them.
        days: number of days for which the certificate is valid.

    Raises:
        ConfigError: if there is no CA, or a host is neither a DNS name nor an IP address.
    """
    names = [_alternative(host) for host in hosts]
    signer, key = _authority(folder), ec.generate_private_key(_CURVE)
    built = (
        _certificate(hosts[0], _CA_NAME, key, signer, days, authority=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    _write(folder / "server.key", _private_pem(key), 0o600, replace=True)
    signed = built.sign(signer, hashes.SHA384())
    _write(folder / "server.pem", signed.public_bytes(Encoding.PEM), 0o644, replace=True)


def make_node(folder: Path, name: str) -> None:
    """Write a SuperNode's key pair: ``name``, secret at the site, and ``name.pub`` for the server.

    Args:
        folder: folder of the credentials; created if missing.
        name: file name of the private key.

    Raises:
        ConfigError: if a key of this name exists; a key is never replaced.
    """
    if Path(name).name != name:
        raise ConfigError(f"name={name!r} must be a plain file name")
    key = ec.generate_private_key(_CURVE)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _write(folder / name, private, 0o600)
    _write(folder / f"{name}.pub", public + b" " + name.encode() + b"\n", 0o644)
