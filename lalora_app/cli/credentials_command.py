"""The command `lalora credentials`."""

import argparse
from pathlib import Path
from typing import Any

from lalora_app.cli.argument_types import at_least_one


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


def add_credentials(commands: Any) -> None:
    """Add ``lalora credentials`` for deployments, see docs/deployment.md."""
    credentials = commands.add_parser("credentials", help="keys and certificates of a deployment")
    actions = credentials.add_subparsers(required=True, metavar="ACTION")
    ca = actions.add_parser("ca", help="a certificate authority; once, at the server")
    server = actions.add_parser("server", help="the SuperLink's certificate; also to renew it")
    node = actions.add_parser("node", help="a SuperNode's key pair; at its site")
    for action, act in ((ca, _ca), (server, _server), (node, _node)):
        action.add_argument("folder", type=Path)
        action.set_defaults(act=act)
    server.add_argument(
        "--host", action="append", required=True, dest="hosts", help="name or address; repeatable"
    )
    server.add_argument(
        "--days", type=at_least_one, default=365, help="days of validity (default 365)"
    )
    node.add_argument("name", help="file name of the key")
