"""Check, before any training, that server and site have the same base model.

Privacy: hashes of public weights and of preprocessing; no private data is involved.
"""

import re
from collections.abc import Mapping

from flwr.app import ConfigRecord, RecordDict

from lalora_app.wire.tensors import WireError

MODEL = "model"  # record of the base model's hashes, in replies to the query and in train requests
_HASH = re.compile(r"[0-9a-f]{64}")
_SHOWN = 12  # hex digits in an error


class OtherModelError(WireError):
    """Server and site hold different base models."""


def model_record(fingerprint: Mapping[str, str]) -> ConfigRecord:
    """Pack the SHA-256 of each part of a base model."""
    return ConfigRecord(dict(fingerprint))


def model_of(content: RecordDict) -> dict[str, str]:
    """Read the hashes of the other side's base model.

    Raises:
        WireError: if there is none, or one is not a SHA-256.
    """
    record = content.config_records.get(MODEL, ConfigRecord())
    hashes = {part: value for part, value in record.items() if isinstance(value, str)}
    whole = hashes and len(hashes) == len(record)
    if not whole or not all(_HASH.fullmatch(value) for value in hashes.values()):
        raise WireError("the record of the base model must hold SHA-256 hashes")
    return hashes


def check_same_model(site: str, at_site: Mapping[str, str], at_server: Mapping[str, str]) -> None:
    """Check that a site's base model is the server's.

    Args:
        site: the site's name.
        at_site: the SHA-256 of each part at the site.
        at_server: the SHA-256 of each part at the server.

    Raises:
        OtherModelError: naming the site, the parts that differ, and both hashes.
    """
    different = [
        f"{part} {at_site.get(part, 'none')[:_SHOWN]} at the site, {own[:_SHOWN]} at the server"
        for part, own in at_server.items()
        if at_site.get(part) != own
    ]
    if different:
        raise OtherModelError(
            f'site "{site}" must have the base model of the server: ' + "; ".join(different)
        )
