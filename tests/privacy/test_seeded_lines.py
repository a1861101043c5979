"""Lines of the ledger with seeded noise: the server can compute it, so it hides nothing."""

import math

import pytest

from helpers.older_ledgers import write_older
from lalora_app.cli import main
from lalora_app.privacy.accounting import Release, epsilon
from lalora_app.privacy.budget import BudgetError, Limit
from lalora_app.privacy.ledger import Ledger
from lalora_app.privacy.ledger_entries import (
    releases_alone,
    releases_drawn,
    releases_of,
    worst_releases,
)

DELTA = 1e-5
ROUND = Release(0.1, 1.5, 4)
NO_LIMIT = Limit(math.inf, DELTA)


@pytest.fixture
def ledger(tmp_path, monkeypatch) -> Ledger:
    monkeypatch.setenv("LALORA_HOME", str(tmp_path))
    return Ledger(tmp_path / "ledger.sqlite")


def reserve(ledger, *, seeded=True, run_limit=NO_LIMIT, node_limit=NO_LIMIT, part="", run="run"):
    limits = {"run_limit": run_limit, "node_limit": node_limit, "part": part}
    return ledger.reserve("data", run, 1, ROUND, planned=ROUND.count, **limits, seeded=seeded)


def test_a_line_with_seeded_noise_makes_the_epsilon_of_its_dataset_infinite(ledger):
    reserve(ledger, seeded=False)
    assert math.isfinite(epsilon(worst_releases(ledger.entries(), DELTA), DELTA))
    reserve(ledger)
    entries = ledger.entries()
    assert [entry.seeded for entry in entries] == [False, True]
    for seen in (releases_of(entries), releases_alone(entries)):
        assert [release.noise_multiplier for release in seen] == [1.5, 0.0]
    assert math.isinf(epsilon(worst_releases(entries, DELTA), DELTA))
    assert releases_drawn(entries) == ledger.releases("data") == [ROUND, ROUND]


def test_only_the_part_that_seeded_noise_was_added_for_is_infinite(ledger):
    reserve(ledger, part="one/1")
    reserve(ledger, part="one/2", seeded=False)
    spent = [
        epsilon(worst_releases(ledger.entries(), DELTA, part=part), DELTA)
        for part in ("one/1", "one/2")
    ]
    assert spent == [math.inf, epsilon([ROUND], DELTA)]


def test_a_run_with_seeded_noise_has_the_limit_of_a_private_run(ledger):
    limit = Limit(epsilon([ROUND, ROUND], DELTA) + 1e-6, DELTA)
    assert reserve(ledger, run_limit=limit).noise_multiplier == 1.5
    reserve(ledger, run_limit=limit)
    with pytest.raises(BudgetError, match="the run's epsilon would be"):
        reserve(ledger, run_limit=limit)


def test_a_limit_of_a_dataset_refuses_seeded_noise_and_all_that_follows_it(ledger):
    limit = Limit(1e6, DELTA)
    with pytest.raises(BudgetError, match="the node's epsilon would be inf"):
        reserve(ledger, node_limit=limit)
    assert ledger.entries() == []
    reserve(ledger)
    with pytest.raises(BudgetError, match="the node's epsilon would be inf"):
        reserve(ledger, seeded=False, node_limit=limit, run="another")


def test_a_run_that_turns_to_secret_noise_counts_its_seeded_rounds_as_open(ledger):
    reserve(ledger)
    with pytest.raises(BudgetError, match="the run's epsilon would be inf"):
        reserve(ledger, seeded=False, run_limit=Limit(1e6, DELTA))


def test_a_merge_keeps_the_mark_and_an_older_ledger_has_none(ledger, tmp_path, capsys):
    path = tmp_path / "old.sqlite"
    write_older(path, "seeded INTEGER")
    reserve(ledger)
    Ledger(path).merge(ledger)
    assert [entry.seeded for entry in Ledger(path).entries()] == [None, True]
    reserve(ledger, seeded=False)
    ledger.merge(Ledger(path))
    assert [entry.seeded for entry in ledger.entries()] == [True, False, None]
    assert main.main(["ledger", "show", "--path", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("lines of older versions, counted")
    assert main.main(["ledger", "export", "--path", str(path)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.rpartition(",")[2] for row in rows] == ["seeded", "", "1"]


def test_the_share_of_an_upload_with_seeded_noise_counts_as_none(ledger):
    alone = {"alone": 1.0, "alone_limit": Limit(1e6, DELTA), "planned": ROUND.count}
    limits = {"run_limit": NO_LIMIT, "node_limit": NO_LIMIT} | alone
    with pytest.raises(BudgetError, match="the node's epsilon-alone would be inf"):
        ledger.reserve("data", "run", 1, ROUND, **limits, seeded=True)
    ledger.reserve("data", "run", 1, ROUND, **limits | {"alone_limit": NO_LIMIT}, seeded=True)
    assert [release.noise_multiplier for release in releases_alone(ledger.entries())] == [0.0]


def test_the_commands_tell_that_seeded_noise_gives_no_guarantee(ledger, capsys):
    reserve(ledger, seeded=False, run="secret")
    reserve(ledger, run="known")
    assert main.main(["ledger", "show"]) == 0
    shown = capsys.readouterr().out.splitlines()
    told = {line.split("  |  ")[1]: line.split("  |  ")[-1] for line in shown if "  |  " in line}
    secret = f"epsilon {epsilon([ROUND], DELTA):.3f}"
    assert told == {"all runs": "epsilon inf", "known": "epsilon inf", "secret": secret}
    assert (
        shown[-1] == "lines with noise from the run's seed, which the server knows, epsilon inf: 1"
    )
    assert main.main(["ledger", "verify"]) == 0
    assert main.main(["ledger", "verify", "--max-epsilon", "8"]) == 1
    capsys.readouterr()
    assert main.main(["ledger", "export"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith(",uid,seeded")
    assert [row[-2:] for row in rows] == [",0", ",1"]
