"""Pinned peers: a directory passes only if every client is a different known site that signed."""

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_app.privacy.shared_policy import PEER_PREFIX, peer_key
from lalora_app.secagg import peers
from lalora_app.secagg.peers import (
    PeerError,
    SignedKeys,
    check_directory,
    digest_of,
    identity_bytes,
    new_identity,
    public_text,
    sign_keys,
)

SITES = [new_identity() for _ in range(4)]
PUBLIC = [identity_bytes(site) for site in SITES]
RUN, ATTEMPT, DIGEST = "rolora-20261127-101112-abcdef", 3, hashlib.sha256(b"constants").digest()
ORDER = {"run": RUN, "attempt": ATTEMPT, "digest": DIGEST}
NUMBERS = (1, 5, 7)  # client numbers need not be consecutive
SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)


def entry(site: int, client: int, **changes) -> SignedKeys:
    keys = {"mask_key": bytes([site]) * 40, "cipher_key": bytes([site + 100]) * 40}
    signature = sign_keys(SITES[site], client=client, **{**ORDER, **keys, **changes})
    return SignedKeys(**keys, identity=PUBLIC[site], signature=signature)


def directory() -> dict[int, SignedKeys]:
    return {client: entry(site, client) for site, client in enumerate(NUMBERS)}


def check(entries, pinned=PUBLIC[1:3], own=PUBLIC[0], **changes) -> None:
    check_directory(pinned, own, entries=entries, **{**ORDER, **changes})


def refused(entries, law, **changes) -> None:
    with pytest.raises(PeerError, match=law):
        check(entries, **changes)


def test_signed_keys_of_pinned_sites_pass_for_each_of_them():
    for own in range(3):
        check(directory(), [key for key in PUBLIC if key != PUBLIC[own]], PUBLIC[own])
    check(directory(), PUBLIC)  # a site that pins its own key, too
    check({1: entry(0, 1)})  # the limit case: only itself


@given(
    client=st.sampled_from(NUMBERS),
    name=st.sampled_from(["mask_key", "cipher_key", "identity", "signature"]),
    data=st.data(),
)
@SETTINGS
def test_any_changed_byte_of_an_entry_is_refused(client, name, data):
    entries = directory()
    value = bytearray(getattr(entries[client], name))
    place = data.draw(st.integers(0, len(value) - 1))
    value[place] ^= data.draw(st.integers(1, 255))
    entries[client] = replace(entries[client], **{name: bytes(value)})
    refused(entries, "must")


@given(name=st.sampled_from(["mask_key", "cipher_key", "signature"]), cut=st.integers(1, 40))
@SETTINGS
def test_a_field_that_is_cut_or_longer_is_refused(name, cut):
    entries = directory()
    whole = getattr(entries[5], name)
    for changed in (whole[:-cut], whole + bytes(cut), b""):
        refused({**entries, 5: replace(entries[5], **{name: changed})}, "client 5 must have signed")


def test_bytes_moved_from_one_field_to_the_next_are_refused():
    whole = entry(1, 5)
    joined = whole.mask_key + whole.cipher_key
    for cut in (0, 39, 41, 80):
        moved = replace(whole, mask_key=joined[:cut], cipher_key=joined[cut:])
        refused({**directory(), 5: moved}, "client 5 must have signed")


@pytest.mark.parametrize(
    "changes",
    [
        {"run": RUN + "1"},
        {"run": ""},
        {"attempt": ATTEMPT + 1},
        {"attempt": 31},
        {"digest": hashlib.sha256(b"other constants").digest()},
        {"digest": b""},
    ],
)
def test_signatures_of_another_run_attempt_or_settings_are_refused(changes):
    refused(directory(), "client 1 must have signed", **changes)
    late = {**directory(), 5: entry(1, 5, **changes)}  # an old message, replayed
    refused(late, "client 5 must have signed")


def test_the_number_of_the_client_is_signed():
    moved = {1: entry(0, 1), 5: entry(2, 7), 7: entry(1, 5)}
    refused(moved, "client 5 must have signed")
    # Attempt 1 of client 23 is not attempt 12 of client 3.
    near = sign_keys(SITES[1], RUN, 1, 23, b"m", b"c", DIGEST)
    entries = {1: entry(0, 1, attempt=12), 3: SignedKeys(b"m", b"c", PUBLIC[1], near)}
    refused(entries, "client 3 must have signed", attempt=12)


def test_swapped_signatures_are_refused():
    entries = directory()
    first, second = entries[5], entries[7]
    entries[5] = replace(first, signature=second.signature)
    entries[7] = replace(second, signature=first.signature)
    refused(entries, "client 5 must have signed")


def test_an_identity_that_occurs_twice_is_refused():
    refused({**directory(), 9: entry(1, 9)}, "client 5 must have a signing key that no other")
    refused({**directory(), 9: entry(0, 9)}, "client 1 must have a signing key that no other")


def test_an_identity_that_is_not_pinned_is_refused():
    made_up = {**directory(), 9: entry(3, 9)}
    refused(made_up, "client 9 must be one of the pinned peers")
    check(made_up, PUBLIC[1:])
    refused(directory(), "client 5 must be one of", pinned=[])


def test_a_directory_without_the_site_itself_is_refused():
    entries = directory()
    del entries[1]
    refused(entries, "this site's own signed keys")
    refused({}, "this site's own signed keys")


def test_a_message_in_another_domain_is_not_a_signature_of_keys(monkeypatch):
    monkeypatch.setattr(peers, "_DOMAIN", b"another protocol")
    foreign = entry(1, 5)
    monkeypatch.undo()
    refused({**directory(), 5: foreign}, "client 5 must have signed")


def test_the_key_as_text_is_what_a_policy_reads():
    for site, key in zip(SITES, PUBLIC, strict=True):
        assert public_text(site).startswith(PEER_PREFIX)
        assert peer_key(public_text(site)) == key
    assert len({public_text(new_identity()) for _ in range(5)}) == 5


def test_the_digest_tells_settings_apart_and_not_their_order():
    first = digest_of({"a": 1, "b": "x"})
    assert first == digest_of({"b": "x", "a": 1})
    others = [{"a": 1}, {"a": "1", "b": "x"}, {"a": 1, "b": "y"}, {"a": 1.0, "b": "x"}, {}]
    assert len({first, *map(digest_of, others)}) == 6
