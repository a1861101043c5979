"""The command ``lalora ledger``: read, verify, export and merge a client's ledger."""

import argparse
import csv
import math
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lalora_app.cli.argument_types import to_delta, to_limit
from lalora_app.privacy.accounting import (
    PRV_TRUSTED,
    Release,
    epsilon,
    is_tight,
    second_epsilon,
)
from lalora_app.privacy.ledger import Ledger, state_folder
from lalora_app.privacy.ledger_entries import (
    LedgerEntry,
    parts_of,
    releases_alone,
    share_noise,
    worst_releases,
)
from lalora_app.privacy.two_epsilons import sentences
from lalora_app.settings.errors import ConfigError

_AGREEMENT = 0.01  # relative tolerance; both accountants give upper bounds of the same epsilon
_EMPTY = LedgerEntry("", "", "", 0, Release(0.0, 0.0, 1), "")  # for the names of the columns
_SLACK = 0.004  # absolute tolerance: the additive error of the first accountant


def _open_ledger(path: Path | None) -> Ledger:
    file = path or state_folder({}) / "ledger.sqlite"
    if not file.is_file():
        raise ConfigError(
            f"ledger={file} must be an existing ledger: the first private round writes it; --path "
            "names the one of another state-path"
        )
    try:
        return Ledger(file)
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"ledger={file} must be a ledger: {error}") from error


def _groups(entries: Sequence[LedgerEntry]) -> dict[tuple[str, str], list[LedgerEntry]]:
    groups: dict[tuple[str, str], list[LedgerEntry]] = {}
    for entry in entries:
        for run in (entry.run, "all runs"):
            groups.setdefault((entry.dataset, run), []).append(entry)
    return groups


def _show(args: argparse.Namespace) -> int:
    ledger = _open_ledger(args.path)
    entries = ledger.entries(args.dataset)
    print(f"{ledger.path}: {len(entries)} lines, delta {args.delta:g}")
    for (dataset, run), group in sorted(_groups(entries).items()):
        spent = f"epsilon {epsilon(worst_releases(group, args.delta), args.delta):.3f}"
        if share_noise(group):
            opened = worst_releases(group, args.delta, releases_alone)
            spent += f"  |  epsilon-alone {epsilon(opened, args.delta):.3f}"
        steps = sum(entry.release.count for entry in group)
        print(f"{dataset}  |  {run}  |  {steps} releases  |  {spent}")
        for part in parts_of(group):
            own = worst_releases(group, args.delta, part=part)
            print(f"    part {part}  |  epsilon {epsilon(own, args.delta):.3f}")
    _explain(entries)
    return 0


def _explain(entries: Sequence[LedgerEntry]) -> None:
    """Print what is not plain from the numbers: seeded noise, and who is honest for which ε."""
    noised = [entry for entry in entries if entry.release.noise_multiplier > 0]
    if seeded := sum(entry.seeded is True for entry in noised):
        print(
            f"lines with noise from the run's seed, which the server knows, epsilon inf: {seeded}"
        )
    if unknown := sum(entry.seeded is None for entry in noised):
        print(f"lines of older versions, counted as secret, perhaps with seeded noise: {unknown}")
    if share_noise(entries):
        print(*sentences("epsilon", "epsilon-alone"), sep="\n")


def _verified(
    releases: Sequence[Release], delta: float, limit: float, option: str
) -> tuple[str, int]:
    """Return the text on one ε by both accountants, and the number of faults in it."""
    first, second = epsilon(releases, delta), second_epsilon(releases, delta)
    tolerance = _AGREEMENT * second + _SLACK
    untrusted = min(first, second) > PRV_TRUSTED  # far above any useful epsilon: not compared
    tight = is_tight(releases, delta)  # otherwise RDP, whose epsilon may only be larger
    agree = untrusted or -tolerance <= first - second <= (tolerance if tight else math.inf)
    verdict, name = "agree" if agree else "DISAGREE", "PRV" if tight else "RDP"
    text = f"{name} {first:.4f}  PLD {second:.4f}  {verdict}"
    above = limit < first
    return text + f"\n    above {option} {limit}" * above, int(not agree) + int(above)


def _verify(args: argparse.Namespace) -> int:
    ledger = _open_ledger(args.path)
    if damage := ledger.damage():
        raise ConfigError(f"ledger={ledger.path} must be whole: {damage}")
    wrong, entries = 0, ledger.entries(args.dataset)
    for (dataset, run), group in sorted(_groups(entries).items()):
        worst = worst_releases(group, args.delta)
        text, faults = _verified(worst, args.delta, args.max_epsilon, "max-epsilon")
        print(f"{dataset}  |  {run}  |  {text}")
        wrong += faults
        for part in parts_of(group):
            own = worst_releases(group, args.delta, part=part)
            text, faults = _verified(own, args.delta, math.inf, "max-epsilon")
            print(f"    part {part}  |  {text}")
            wrong += faults
        if share_noise(group) or args.max_epsilon_alone < math.inf:
            limit, option = args.max_epsilon_alone, "max-epsilon-alone"
            opened = worst_releases(group, args.delta, releases_alone)
            text, faults = _verified(opened, args.delta, limit, option)
            print(f"    epsilon-alone  |  {text}")
            wrong += faults
    _explain(entries)
    return 1 if wrong else 0


def _csv_line(entry: LedgerEntry) -> dict[str, object]:
    release = entry.release
    return {
        "time": entry.time,
        "dataset": entry.dataset,
        "run": entry.run,
        "round": entry.round,
        "sampling_rate": release.sampling_rate,
        "noise_multiplier": release.noise_multiplier,
        "count": release.count,
        "uid": entry.uid,
        "alone_multiplier": entry.alone,
        "part": entry.part,
        "seeded": None if entry.seeded is None else int(entry.seeded),
    }


def _export(args: argparse.Namespace) -> int:
    entries = _open_ledger(args.path).entries(args.dataset)
    unused = {"alone_multiplier"} if not share_noise(entries) else set()
    unused |= {"part"} if not any(entry.part for entry in entries) else set()
    unused |= {"seeded"} if all(entry.seeded is False for entry in entries) else set()
    columns = [name for name in _csv_line(_EMPTY) if name not in unused]
    writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_csv_line, entries))
    return 0


def _merge(args: argparse.Namespace) -> int:
    ledger, other = _open_ledger(args.path), _open_ledger(args.other)
    new = ledger.merge(other)
    for entry in new:
        print(f"{entry.dataset}  |  {entry.run}  |  round {entry.round}, {entry.time}")
    print(f"{ledger.path}: {len(new)} of the {len(other.entries())} lines of {args.other} are new")
    return 0


def add_ledger(commands: Any) -> None:
    """Add ``lalora ledger`` and its actions to the parser."""
    ledger = commands.add_parser("ledger", help="privacy spent on each dataset")
    actions = ledger.add_subparsers(required=True, metavar="ACTION")
    show = ("show", _show, "print the epsilon of every dataset and run")
    verify = ("verify", _verify, "compute every epsilon again by a second accountant")
    for name, act, text in (show, verify):
        action = actions.add_parser(name, help=text)
        action.add_argument("--path", type=Path, help="the SQLite file (default: this machine's)")
        action.add_argument("--dataset", help="only this dataset")
        action.add_argument(
            "--delta", type=to_delta, default=1e-5, help="delta of the epsilon (default 1e-5)"
        )
        action.set_defaults(act=act)
    action.add_argument(
        "--max-epsilon",
        type=to_limit,
        default=math.inf,
        help="largest allowed epsilon; exit code 1 above it (default: no limit)",
    )
    action.add_argument(
        "--max-epsilon-alone",
        type=to_limit,
        default=math.inf,
        help="the same for the epsilon of uploads with shared noise that a server opens",
    )
    export = actions.add_parser("export", help="every line, as CSV")
    export.add_argument("--path", type=Path, help="the SQLite file (default: this machine's)")
    export.add_argument("--dataset", help="only this dataset")
    export.set_defaults(act=_export)
    merge = actions.add_parser("merge", help="add the lines of another ledger")
    merge.add_argument("other", type=Path, help="the other ledger; not changed")
    merge.add_argument("--path", type=Path, help="the ledger to extend (default: this machine's)")
    merge.set_defaults(act=_merge)
