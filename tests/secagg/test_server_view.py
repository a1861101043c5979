"""Test that the server sees no single upload."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from helpers import app_runs
from helpers.app_runs import arrays, open_run, run, sized
from helpers.fake_grid import wire_bytes
from helpers.secure_runs import CLIENTS, ON, STAGES, lose, stages_of, uploads
from lalora_app.secagg import fixed_point
from lalora_app.secagg.messages import MASKED

pytestmark = pytest.mark.usefixtures("no_waiting", "no_report")


def words_of(upload, start):
    return fixed_point.quantise(fixed_point.update_of(upload, start), CLIENTS)


def assert_unrelated(masked, hidden):
    """Correlation within five standard errors of zero."""
    found = np.corrcoef(masked.astype(np.float64), hidden)[0, 1]
    assert abs(found) < 5 / np.sqrt(masked.size)


def test_no_message_to_the_server_holds_a_clients_factor(tiny, rounds):
    done = run(tiny(**sized(CLIENTS) | ON), CLIENTS, fault=lose("train", 2, 1))
    everything = [wire_bytes(reply) for reply in done.grid.replies()]
    # The lost message had the shares for attempt 3 too, so that client is not asked in it.
    assert len(done.grid.trained()) == len(rounds) == 3 * CLIENTS - 1
    for exchange, local in zip(done.grid.trained(), rounds, strict=True):
        start = exchange.start
        sent = uploads(done, rounds, exchange.attempt)[exchange.partition]
        start = {name: start[name] for name in sent}
        words = words_of(sent, start)
        assert any(local.result[name].tobytes() != start[name].tobytes() for name in sent)
        assert set(exchange.reply.content["arrays"]) == {MASKED}
        masked = arrays(exchange.reply)[MASKED]
        assert masked.dtype == np.uint32
        for hidden in [*sent.values(), words]:
            assert not any(hidden.tobytes()[:64] in message for message in everything)
        assert_unrelated(masked, fixed_point.update_of(sent, start))
        assert_unrelated(masked, words.astype(np.float64))
        assert_unrelated(masked.view(np.int32), words.view(np.int32).astype(np.float64))
    for one, other in pairwise(done.grid.trained(1)):  # nor do two vectors share a mask
        first, second = (arrays(exchange.reply)[MASKED] for exchange in (one, other))
        assert_unrelated(first, second.astype(np.float64))


def test_the_check_for_a_factor_in_a_message_can_fail(tiny, rounds):
    done = run(tiny(**open_run(CLIENTS) | {"num-server-rounds": 1}), CLIENTS)  # in the clear
    exchange = done.grid.trained()[0]
    hidden = next(iter(uploads(done, rounds, 1)[exchange.partition].values()))
    assert hidden.tobytes()[:64] in wire_bytes(exchange.reply)
    words = words_of({"x": hidden}, {"x": np.zeros_like(hidden)})
    with pytest.raises(AssertionError):
        assert_unrelated(words.view(np.int32), hidden.ravel().astype(np.float64))


def test_nothing_but_the_allowed_keys_leaves_a_client(tiny):
    done = run(tiny(**sized(CLIENTS) | ON), CLIENTS)
    code, seen = {"config": {"code"}}, Counter()
    allowed = {
        "train": code | {"arrays": {MASKED}, "metrics": {"round", "epsilon"}},
        "advertise": {"advertise": {"code", "mask-key", "cipher-key"}},
        "share": {"share": {"code", "shares-of", "shares", "seed", "noise"}},
        "unmask": {"unmask": {"code", "shares-of", "shares", "noise-of", "noise"}},
    }
    hello = {"config": {"client", "rank", "code"}, "model": {"weights", "tokenizer"}}
    for exchange in done.grid.exchanges:
        stages = stages_of(exchange.request) if exchange.attempt else {}
        found = {key: fields for stage in stages for key, fields in allowed[stage].items()}
        assert app_runs.contents(exchange.reply) == (found or hello)
        seen.update(stages.keys())
    assert seen == dict.fromkeys(STAGES, 3 * CLIENTS)


def given_by(exchange):
    """Which secret of every client a reply to `unmask` gives a share of."""
    order = exchange.request.content["unmask"]
    return {c: "seed" for c in order["arrived"]} | {c: "key" for c in order["lost"]}


def test_a_vector_that_comes_late_stays_closed(tiny):
    """Of a client that is counted as lost the server learns the mask key, and never the seed."""
    done = run(tiny(**open_run(CLIENTS) | ON), CLIENTS, fault=lose("train", 2, 1))
    asked = [e for e in done.grid.exchanges if "unmask" in e.request.content]
    for attempt in (1, 2, 3):
        views = [given_by(e) for e in asked if e.attempt == attempt]
        assert len(views) == (4 if attempt == 1 else 3)
        assert all(view == views[0] for view in views)
        assert Counter(views[0].values())["key"] == (1 if attempt == 2 else 0)
