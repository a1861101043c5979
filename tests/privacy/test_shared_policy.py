"""The site's conditions for shared noise: off unless allowed, and what they refuse."""

import math
from dataclasses import replace

import pytest

from conftest import make_config
from lalora_app.privacy.budget import Limit
from lalora_app.privacy.policy import PolicyError, read_policy, read_policy_file
from lalora_app.privacy.shared_policy import SharedNoise, peer_key, peer_text
from lalora_app.settings.errors import ConfigError

KEYS = [bytes([number]) * 32 for number in range(3)]
BASE = "max-epsilon = 8.0\ndelta = 1e-6\n[datasets.ward]\nmax-epsilon = 2.0\ndelta = 1e-7\n"
TABLE = f"""
[shared-noise]
max-epsilon-alone = 20.0
min-honest = 2
min-colluding = 1
peers = ["{peer_text(KEYS[0])}", "{peer_text(KEYS[1])}", "{peer_text(KEYS[2])}"]
"""


@pytest.fixture
def policy(tmp_path):
    def write(text):
        path = tmp_path / "policy.toml"
        path.write_text(text, "utf-8")
        return path

    return write


def asked(colluding=0, share="sum", noise="secure"):
    """A run's config with shared noise."""
    own = {"privacy.noise-share": share, "privacy.colluding": colluding, "privacy.noise": noise}
    steps = {"train.local-steps": 1, "train.sampling-rate": 0.1, "secure-aggregation": "secagg+"}
    budget = {"privacy.epsilon": math.inf} if noise == "seeded" else {}
    return make_config(**own, **steps, **budget)


def test_a_file_has_conditions_with_the_delta_of_its_dataset(policy):
    path = policy(BASE + TABLE)
    found = read_policy_file(path).shared_noise
    assert found == SharedNoise(Limit(20.0, 1e-6), 2, 1, frozenset(KEYS))
    ward = read_policy_file(path, "ward")
    assert ward.alone_limit == Limit(20.0, 1e-7)
    assert ward.limit == Limit(2.0, 1e-7)


def test_a_short_table_pins_nobody_and_demands_one_honest_share(policy):
    found = read_policy_file(policy(BASE + "[shared-noise]\nmax-epsilon-alone = inf\n"))
    assert found.shared_noise == SharedNoise(Limit(math.inf, 1e-6), 1, 0, None)


def test_without_the_table_a_site_refuses_and_a_simulated_client_allows(policy):
    own = {"data-path": "/data", "max-epsilon": 8.0, "delta": 1e-6}
    file = {"data-path": "/data", "policy": str(policy(BASE))}
    simulated_with_policy = {"policy": file["policy"]}
    for node in (own, file, simulated_with_policy):
        found = read_policy(node, 1e-5, public=False)
        assert found.alone_limit is None
        found.check_run(asked(share="own"))
        with pytest.raises(PolicyError, match=r'noise-share="sum" must be "own": .*shared-noise'):
            found.check_run(asked())
        with pytest.raises(PolicyError, match="noise-share"):
            found.check_cohort(10, 0)
    simulated = read_policy({"partition-id": 0}, 1e-5, public=False)
    assert simulated.alone_limit == Limit(math.inf, 1e-5)
    simulated.check_run(asked())
    simulated.check_cohort(1, 0)


def test_a_run_must_withstand_as_many_colluding_clients_as_the_site_says(policy):
    found = read_policy_file(policy(BASE + TABLE))
    found.check_run(asked(colluding=1))
    with pytest.raises(PolicyError, match=r"privacy\.colluding=0 must be at least min-colluding=1"):
        found.check_run(asked(colluding=0))


@pytest.mark.parametrize(
    ("honest", "colluding", "law"),
    [(1, 1, "1 honest shares .* at least min-honest=2"), (2, 0, "colluding=0 must be at least")],
)
def test_an_attempt_with_too_few_honest_shares_is_refused(policy, honest, colluding, law):
    found = read_policy_file(policy(BASE + TABLE))
    found.check_cohort(2, 1)
    found.check_cohort(9, 4)
    with pytest.raises(PolicyError, match=law):
        found.check_cohort(honest, colluding)


def test_a_finite_limit_alone_refuses_seeded_noise(policy):
    text = "max-epsilon = inf\ndelta = 1e-6\n[shared-noise]\nmax-epsilon-alone = 20.0\n"
    found = read_policy_file(policy(text))
    with pytest.raises(PolicyError, match=r'noise="seeded" must be "secure".*max-epsilon-alone=20'):
        found.check_run(asked(noise="seeded"))
    read_policy_file(policy(text.replace("20.0", "inf"))).check_run(asked(noise="seeded"))


@pytest.mark.parametrize(
    ("old", "new", "law"),
    [
        ("max-epsilon-alone = 20.0", "", "shared-noise: max-epsilon-alone is missing"),
        ("= 20.0", "= 0", "max-epsilon-alone=0.0 must be greater than 0"),
        ("= 20.0", "= nan", "max-epsilon-alone=nan must be greater than 0"),
        ("= 20.0", '= "20"', "max-epsilon-alone='20' must be a number"),
        ("min-honest = 2", "min-honest = 0", "min-honest=0 must be an integer of at least 1"),
        ("min-honest = 2", "min-honest = 1.5", "min-honest=1.5 must be an integer"),
        ("min-honest = 2", "min-honest = true", "min-honest=True must be an integer"),
        ("min-colluding = 1", "min-colluding = -1", "min-colluding=-1 must be an integer of at"),
        (
            "min-colluding = 1",
            "max-colluding = 1",
            "max-colluding must be one of max-epsilon-alone",
        ),
        ("min-honest = 2", "min-honest = 3", "peers=3 keys must be at least 4, the sum of"),
        ("lalora-peer:AAAA", "lalora-peer:AAA", "peers: 'lalora-peer:AAAA.* must be a line that"),
        ("lalora-peer:AAAA", "AAAA", "must be a line that `lalora credentials peer` printed"),
        ("lalora-peer:AQEB", "lalora-peer:A*EB", "must be a line that"),
        (peer_text(KEYS[0]), peer_text(KEYS[1]), "peers must not name a key twice"),
        ("peers = [", "peers = [1,", "must be a list of at least one name"),
    ],
)
def test_a_wrong_table_is_one_line_with_the_files_name(policy, old, new, law):
    assert TABLE.count(old) == 1
    path = policy(BASE + TABLE.replace(old, new))
    with pytest.raises(ConfigError, match=law) as caught:
        read_policy_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_table_but_a_value_is_refused(policy):
    with pytest.raises(ConfigError, match="shared-noise: must be a table"):
        read_policy_file(policy("shared-noise = true\n" + BASE))


def test_the_policy_in_words_has_the_conditions(policy):
    found = read_policy_file(policy(BASE + TABLE))
    assert "noise may be shared, with epsilon-alone up to 20 at delta 1e-06, over all runs" in (
        found.lines()
    )
    assert "shared noise takes keys of 3 other sites only" in found.lines()
    unpinned = replace(found, shared_noise=replace(found.shared_noise, peers=None))
    assert "shared noise takes keys of any client" in unpinned.lines()
    assert read_policy_file(policy(BASE)).lines()[-1] == "noise may not be shared"


def test_a_key_as_text_is_one_word_and_comes_back():
    for key in KEYS:
        assert peer_key(peer_text(key)) == key
    short = peer_text(KEYS[0][:31])
    for text in ("", "lalora-peer:", short, peer_text(KEYS[0]) + "\n", peer_text(KEYS[0])[:-1]):
        with pytest.raises(ValueError, match="must be a line"):
            peer_key(text)
