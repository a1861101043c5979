import pytest
from helpers.app_runs import *
pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")
@pytest.mark.parametrize("head",["auto","zero","class-means"])
def test_x(tiny, head):
    done = run(tiny(**sized(**{"model.head":head,"train.head-rounds":1,"num-server-rounds":5})))
    for r in done.rows: print(r["round"],r["phase"],r["upload_bytes"],r["epsilon_max"],r["accuracy"],r["remaining_error"])
    from lalora_app.privacy.ledger import Ledger, state_folder
    for e in Ledger(state_folder({})/"ledger.sqlite").entries(): print(e.dataset[-8:],e.round,e.release)
    print(done.json("privacy.json"))
