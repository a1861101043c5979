"""The command `lalora credentials`."""

import argparse
from pathlib import Path
from typing import Any

from lalora_app.cli.argument_types import at_least_one
from lalora_app.settings.errors import ConfigError


def _ca(args: argparse.Namespace) -> int:
    from lalora_app.cli.credentials import make_ca

    make_ca(args.folder)
    print(f"lalora: ca.crt is for everyone; ca.key stays here, in {args.folder}")
    return 0


def _server(args: argparse.Namespace) -> int:
    from lalora_app.cli.credentials import make_server

    make_server(args.folder, args.hosts, args.days)
    print(f"lalora: server.pem and server.key, for {args.days} days, are in {args.folder}")
    return 0


def _node(args: argparse.Namespace) -> int:
    from lalora_app.cli.credentials import make_node

    make_node(args.folder, args.name)
    print(f"lalora: {args.name}.pub is for the server; {args.name} stays here, in {args.folder}")
    return 0


def _peer(args: argparse.Namespace) -> int:
    from lalora_app.secagg.peers import public_text
    from lalora_app.site_files.peer_key import make_peer_key

    if Path(args.name).name != args.name:
        raise ConfigError(f"name={args.name!r} must be a plain file name")
    identity = make_peer_key(args.folder / args.name)
    print(
        f"lalora: {args.name} stays here, in {args.folder}; the next line is for the policies of "
        "the other sites, over a channel that they trust"
    )
    print(public_text(identity))
    return 0


def add_credentials(commands: Any) -> None:
    """Add ``lalora credentials`` for deployments, see docs/deployment.md."""
    credentials = commands.add_parser("credentials", help="keys and certificates of a deployment")
    actions = credentials.add_subparsers(required=True, metavar="ACTION")
    ca = actions.add_parser("ca", help="a certificate authority; once, at the server")
    server = actions.add_parser("server", help="the SuperLink's certificate; also to renew it")
    node = actions.add_parser("node", help="a SuperNode's key pair; at its site")
    peer = actions.add_parser("peer", help="a site's signing key, for shared noise; at its site")
    for action, act in ((ca, _ca), (server, _server), (node, _node), (peer, _peer)):
        action.add_argument("folder", type=Path)
        action.set_defaults(act=act)
    server.add_argument(
        "--host", action="append", required=True, dest="hosts", help="name or address; repeatable"
    )
    server.add_argument(
        "--days", type=at_least_one, default=365, help="days of validity (default 365)"
    )
    for action in (node, peer):
        action.add_argument("name", help="file name of the key")
