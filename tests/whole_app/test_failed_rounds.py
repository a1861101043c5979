"""Test rounds without enough replies, and what a run writes about them."""

from collections import Counter

import pytest
from flwr.app import Context, RecordDict

from helpers.app_runs import (
    Run,
    by_dataset,
    ledger_entries,
    of_kind,
    open_run,
    run,
    run_folder,
    same_bits,
    sized,
)
from helpers.fake_grid import FakeGrid
from lalora_app import server_app
from lalora_app.models import backbone
from lalora_app.settings.run_config import flatten

pytestmark = pytest.mark.usefixtures("no_waiting")
without_report = pytest.mark.usefixtures("no_report")


@without_report
def test_a_failed_attempt_is_repeated_and_told(tiny):
    def fault(attempt, partition, reply):
        return None if attempt in (2, 4) and partition == 1 else reply

    done = run(tiny(**open_run() | {"num-server-rounds": 4}), 2, fault=fault)
    assert [row["round"] for row in done.rows] == [1, 2, 2, 3]
    assert [row["phase"] for row in done.rows] == ["B", "A", "A", "B"]
    assert [row["aggregated"] for row in done.rows] == [True, False, True, False]
    for failed in (1, 3):
        assert done.rows[failed]["dropped"] == ["1 did not answer in time"]
        assert done.rows[failed]["accuracy"] == done.rows[failed - 1]["accuracy"]
    before, after, last = (done.grid.trained(i)[0].start for i in (2, 3, 4))
    assert same_bits(before, after)
    assert same_bits(done.adapter, last)  # and not what the last client to train left in memory
    summary = done.json("summary.json")
    assert (summary["rounds"], summary["status"]) == (2, "completed, 2 rounds failed")


@pytest.mark.parametrize(
    ("every", "lost", "looks"),
    [(2, (), [0, 2, 4, 5]), (9, (), [0, 5]), (2, (2, 5), [0, 2, 4, 5]), (1, (2,), [0, 1, 3, 4, 5])],
    ids=["every second", "the last only", "and failed attempts", "a failed one is no new look"],
)
def test_the_test_split_is_looked_at_as_often_as_asked_and_at_the_end(
    tiny, monkeypatch, caplog, every, lost, looks
):
    seen, evaluate = [], backbone.Backbone.evaluate

    def counted(model, batches):
        seen.append(len(grid.trained()) // 2)  # attempts so far, of two clients
        return evaluate(model, batches)

    def fault(attempt, partition, reply):
        return None if attempt in lost and partition == 1 else reply

    monkeypatch.setattr(backbone.Backbone, "evaluate", counted)
    config = tiny(**open_run() | {"num-server-rounds": 5, "evaluate-every": every})
    grid = FakeGrid(config, 2, fault=fault)
    with caplog.at_level("INFO", "flwr"):
        server_app.run(grid, config)
    done = Run(config, grid, run_folder(config))
    # A failed attempt changes no adapter: nothing new to look at, if the one before was looked at.
    expected = [t for t in looks if t not in lost or (t - 1) not in looks]
    assert seen == expected
    told = [row["attempt"] for row in done.rows if "accuracy" in row]
    assert told == sorted({t for t in range(1, 6) if t % every == 0} | {5})
    assert done.json("summary.json")["accuracy"] == done.rows[-1]["accuracy"]
    assert caplog.text.count("not evaluated") == 5 - len(told)
    assert "<svg" in (done.folder.path / "report.html").read_text("utf-8")


@without_report
def test_a_failed_attempt_costs_no_resident_factor(tiny, rounds):
    config = tiny(**open_run())
    run(config, 2, fault=lambda attempt, _, reply: None if attempt == 2 else reply)
    (first, _), (again, _) = rounds[0:2], rounds[4:6]
    assert (first.t, again.t) == (1, 2)
    assert same_bits(of_kind(again.start, "A"), of_kind(first.result, "A"))


def test_a_run_without_any_aggregate_fails_with_its_reasons(tiny):
    config = tiny(**open_run())
    grid = FakeGrid(config, 2, fault=lambda attempt, _, reply: None if attempt else reply)
    with pytest.raises(RuntimeError, match="no round was aggregated: 2 did not answer in time"):
        server_app.run(grid, config)
    summary = Run(config, grid, run_folder(config)).json("summary.json")
    assert set(summary) == {"method", "status"}
    assert summary["status"].startswith("failed")


def test_a_report_that_cannot_be_drawn_costs_no_result(tiny, monkeypatch, caplog):
    def broken(*args):
        raise ValueError("no font")

    monkeypatch.setattr("lalora_app.reports.page.write_report", broken)
    done = run(tiny(**open_run()))
    assert done.json("summary.json")["status"] == "completed"
    assert not (done.folder.path / "report.html").exists()
    assert "report.html is missing, all other results are saved: no font" in caplog.text


@without_report
def test_two_runs_on_the_same_data_have_two_books(tiny):
    config = tiny(**sized())
    for _ in range(2):
        server_app.run(FakeGrid(config, 2), config)
    for book in by_dataset(ledger_entries()).values():
        runs = Counter(entry.run for entry in book)
        assert sorted(runs.values()) == [3, 3]


def test_an_error_of_ours_keeps_its_traceback_and_is_told_in_a_line(tiny, monkeypatch, caplog):
    def broken(*args):
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr(server_app, "run", broken)
    context = Context(1, 1, {}, RecordDict(), flatten(tiny()))
    with caplog.at_level("ERROR", "flwr"), pytest.raises(ZeroDivisionError) as caught:
        server_app.main(FakeGrid({}, 1), context)
    assert caught.traceback[-1].name == "broken"
    assert caplog.messages == ["LaLoRA: ZeroDivisionError: division by zero"]
