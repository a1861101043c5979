"""Keys and certificates of a deployment, tried in a TLS handshake as OpenSSL's strictest."""

import contextlib
import ssl
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from lalora_app.cli import main
from lalora_app.cli.credentials import make_ca, make_node, make_server
from lalora_app.settings.errors import ConfigError


@pytest.fixture
def server(tmp_path) -> Path:
    folder = tmp_path / "server"
    make_ca(folder)
    make_server(folder, ["flower.example.org", "127.0.0.1"], days=30)
    return folder


def shake_hands(server: Path, ca: Path, host: str) -> str:
    """A TLS handshake in memory; returns the protocol, raises what the client raises."""
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(server / "server.pem", server / "server.key")
    asking = ssl.create_default_context(cafile=str(ca / "ca.crt"))
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(down, up, server_hostname=host)
    other = accepting.wrap_bio(up, down, server_side=True)
    for side in (client, other, client, other):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return str(client.version())


@pytest.mark.parametrize("host", ["flower.example.org", "127.0.0.1"])
def test_the_servers_certificate_holds_for_its_names(server, host):
    assert shake_hands(server, server, host) == "TLSv1.3"


def test_another_name_and_another_ca_are_rejected(server, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(server, server, "other.example.org")
    make_ca(tmp_path / "other")
    # Both CAs have one name; what differs is the key.
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        shake_hands(server, tmp_path / "other", "127.0.0.1")


def test_a_renewed_certificate_holds_under_the_same_ca(server):
    before = (server / "server.pem").read_bytes()
    make_server(server, ["127.0.0.1"], days=30)
    assert (server / "server.pem").read_bytes() != before
    assert shake_hands(server, server, "127.0.0.1") == "TLSv1.3"


def test_keys_are_for_their_owner_only(server, tmp_path):
    make_node(tmp_path, "site-0")
    for key in (server / "ca.key", server / "server.key", tmp_path / "site-0"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_node_key_is_a_pair_of_the_kind_that_flower_takes(tmp_path):
    make_node(tmp_path, "site-0")
    private = load_ssh_private_key((tmp_path / "site-0").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "site-0.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == public


def test_a_ca_and_a_node_key_are_never_replaced(server, tmp_path):
    make_node(tmp_path, "site-0")
    before = (tmp_path / "site-0").read_bytes(), (server / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="site-0 must be a new file"):
        make_node(tmp_path, "site-0")
    with pytest.raises(ConfigError, match=r"ca\.key must be a new file"):
        make_ca(server)
    assert before == ((tmp_path / "site-0").read_bytes(), (server / "ca.key").read_bytes())


@pytest.mark.parametrize(
    ("arguments", "law"),
    [
        (["server", "NOWHERE", "--host", "a.org"], "ca.key must be the key"),
        (["server", "SERVER", "--host", "no host"], "host='no host' must be a DNS name or an IP"),
        (["node", "SERVER", "../site"], "name='../site' must be a plain file name"),
    ],
)
def test_the_command_names_what_is_wrong(server, capsys, arguments, law):
    places = {"NOWHERE": str(server / "none"), "SERVER": str(server)}
    assert main.main(["credentials", *(places.get(word, word) for word in arguments)]) == 2
    assert law in capsys.readouterr().err


def test_the_command_makes_all_that_a_deployment_needs(tmp_path, capsys):
    folder = str(tmp_path / "new")
    assert main.main(["credentials", "ca", folder]) == 0
    assert main.main(["credentials", "server", folder, "--host", "127.0.0.1", "--days", "7"]) == 0
    assert main.main(["credentials", "node", folder, "site-0"]) == 0
    made = {path.name for path in Path(folder).iterdir()}
    assert made == {"ca.key", "ca.crt", "server.key", "server.pem", "site-0", "site-0.pub"}
    assert shake_hands(Path(folder), Path(folder), "127.0.0.1") == "TLSv1.3"
    assert "site-0.pub is for the server" in capsys.readouterr().out
