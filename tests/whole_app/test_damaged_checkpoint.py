"""A run that is resumed from the older of its two checkpoints."""

from helpers.app_runs import run, sized
from lalora_app.privacy.ledger import Ledger, state_folder
from lalora_app.settings.run_config import flatten, parse


def test_the_repeated_round_is_answered_again_and_costs_nothing(tiny, no_waiting, caplog):
    config = tiny(**sized() | {"num-server-rounds": 2})
    whole = run(config)
    ledger = Ledger(state_folder({}) / "ledger.sqlite")
    before, adapter = ledger.entries(), whole.folder.latest().adapter
    newest = sorted((whole.folder.path / "checkpoints").iterdir())[-1]
    newest.write_bytes(bytes(newest.stat().st_size))
    again = run(parse(flatten(config) | {"resume-from": str(whole.folder.path)}))
    assert [str(newest) in r.getMessage() for r in caplog.records if "damaged" in r.msg] == [True]
    assert [row["attempt"] for row in again.rows] == [1, 2]
    assert ledger.entries() == before
    found = again.folder.latest()
    assert (found.attempts, found.round) == (2, 2)
    assert all((found.adapter[name] == adapter[name]).all() for name in adapter)
