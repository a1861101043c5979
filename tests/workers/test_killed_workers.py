"""A worker process that is killed in any stage of a message: told, replaced, counted once."""

import pytest

from helpers.app_runs import by_dataset, ledger_entries, run_folder, sized
from helpers.worker_mains import serve_and_die
from lalora_app import server_app
from lalora_app.settings.run_config import flatten
from lalora_app.workers.local_grid import LocalGrid
from lalora_app.workers.worker import Place
from lalora_app.workers.worker_pool import WorkerPool

# stage -> the number of the ledger's lines of the round in which the worker dies, and of replies
STAGES = {
    "before the reservation": (1, 1),
    "after the reservation": (2, 1),
    "after the training": (2, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_worker_killed_in_a_round_costs_this_reply_only(stage, tiny, tmp_path, caplog):
    config = tiny(**sized(2) | {"min-replies": 1})
    orders = flatten(config) | {"stage": stage, "folder": str(tmp_path)}
    with WorkerPool([Place(1), Place(1)], orders, serve_and_die) as pool:
        server_app.run(LocalGrid(pool, 2), config)
    assert (tmp_path / "killed").exists()
    first, *later = run_folder(config).history()
    lines, replies = STAGES[stage]
    assert (first["aggregated"], first["replies"]) == (True, replies)
    assert len(first["dropped"]) == 2 - replies
    assert "a worker process has ended with exit code -9" in caplog.text
    assert [(row["replies"], row["dropped"]) for row in later] == [(2, [])] * 2
    entries = ledger_entries()
    assert len([entry for entry in entries if entry.round == 1]) == lines
    books = by_dataset(entries)
    assert len(books) == 2
    for own in books.values():  # never two reservations of one message
        rounds = [entry.round for entry in own]
        assert len(rounds) == len(set(rounds))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["before the ClientApp", "before the reply is sent"])
def test_a_worker_killed_at_the_first_question_ends_the_run_before_any_budget(
    stage, tiny, tmp_path
):
    config = tiny(**sized(2))
    orders = flatten(config) | {"stage": stage, "folder": str(tmp_path)}
    with (
        WorkerPool([Place(1), Place(1)], orders, serve_and_die) as pool,
        pytest.raises(Exception, match="none may refuse: error 0: the client's process"),
    ):
        server_app.run(LocalGrid(pool, 2), config)
    assert (tmp_path / "killed").exists()
    assert ledger_entries() == []
