"""The file of a site's signing key: made once, for its owner only, and refused if it is wrong."""

import stat
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from conftest import make_config
from lalora_app.cli import main
from lalora_app.client.site import _identity, admit
from lalora_app.privacy.budget import Limit
from lalora_app.privacy.policy import Policy
from lalora_app.privacy.shared_policy import SharedNoise, peer_key
from lalora_app.secagg.peers import identity_bytes, new_identity, public_text
from lalora_app.settings.errors import ConfigError
from lalora_app.site_files import peer_key as module
from lalora_app.site_files.peer_key import make_peer_key, read_peer_key

LIMIT = Limit(8.0, 1e-5)


def test_a_key_comes_back_and_is_for_its_owner_only(tmp_path):
    path = tmp_path / "keys" / "peer"
    made = make_peer_key(path)
    assert public_text(read_peer_key(path)) == public_text(made)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["peer"]


def test_a_key_is_never_replaced(tmp_path):
    path = tmp_path / "peer"
    make_peer_key(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="peer must be a new file: File exists"):
        make_peer_key(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["peer"]


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(path, content):
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_new", full)
    with pytest.raises(ConfigError, match="peer must be a new file: No space left"):
        make_peer_key(tmp_path / "peer")
    assert list(tmp_path.iterdir()) == []


def wrong_files():
    pem, form = Encoding.PEM, PrivateFormat.PKCS8
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, form, NoEncryption())
    locked = new_identity().private_bytes(pem, form, BestAvailableEncryption(b"word"))
    return {"other kind": other, "password": locked, "empty": b"", "text": b"lalora-peer:AAAA"}


@pytest.mark.parametrize("kind", sorted(wrong_files()))
def test_a_wrong_file_is_one_line_before_the_site_works(kind, tmp_path):
    path = tmp_path / "peer"
    path.write_bytes(wrong_files()[kind])
    node = {"partition-id": 0, "num-partitions": 2, "peer-key": str(path)}
    with pytest.raises(ConfigError) as caught:
        admit(make_config(), node, 0)
    assert str(caught.value) == (
        f"node config peer-key={path} must be the file that `lalora credentials peer` wrote"
    )


def test_a_missing_file_is_one_line_and_a_right_one_is_the_sites_identity(tmp_path):
    node = {"partition-id": 0, "num-partitions": 2}
    assert admit(make_config(), node, 0).identity is None
    node["peer-key"] = str(tmp_path / "peer")
    with pytest.raises(ConfigError, match="wrote: No such file"):
        admit(make_config(), node, 0)
    made = make_peer_key(tmp_path / "peer")
    assert public_text(admit(make_config(), node, 0).identity) == public_text(made)


def test_a_site_that_pins_peers_needs_a_key_for_shared_noise_only():
    pinned = Policy(LIMIT, shared_noise=SharedNoise(LIMIT, peers=frozenset([bytes(32)])))
    unpinned = Policy(LIMIT, shared_noise=SharedNoise(LIMIT))
    shared, own = (SimpleNamespace(privacy=SimpleNamespace(shared=s)) for s in (True, False))
    with pytest.raises(ConfigError, match="node config must have peer-key"):
        _identity(shared, {}, pinned)
    for config, policy in ((own, pinned), (shared, unpinned), (shared, Policy(LIMIT))):
        assert _identity(config, {}, policy) is None


def test_the_command_prints_the_line_for_the_other_sites(tmp_path, capsys):
    command = ["credentials", "peer", str(tmp_path / "site-0"), "peer"]
    assert main.main(command) == 0
    told, line = capsys.readouterr().out.splitlines()
    assert "stays here" in told
    identity = read_peer_key(tmp_path / "site-0" / "peer")
    assert peer_key(line) == identity_bytes(identity)
    assert main.main(command) == 2
    assert "must be a new file" in capsys.readouterr().err
    assert main.main([*command[:-1], "../peer"]) == 2
    assert "plain file name" in capsys.readouterr().err
