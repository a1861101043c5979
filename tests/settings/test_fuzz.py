"""For arbitrary bytes and values, every parser returns a result or raises its own error.

LALORA_FUZZ=15000 pytest tests/settings/test_fuzz.py    # 105,000 inputs in all
"""

import math
import os
import tomllib

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import defaults, make_config
from lalora_app.client.site import admit
from lalora_app.methods.compatibility import method_of
from lalora_app.privacy.policy import Policy, PolicyError, read_policy, read_policy_file
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config, from_tables, parse
from lalora_app.wire import messages, tensors

ASKED = os.environ.get("LALORA_FUZZ")
fuzz = settings(
    max_examples=int(ASKED or 150),
    derandomize=ASKED is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
RUN = make_config()
DEFAULTS = defaults()
POLICY = (
    b"max-epsilon = 8.0\ndelta = 1e-6\nmin-noise-multiplier = 0.5\nmax-rounds = 9\n"
    b"max-rounds-per-day = 3\nmethods = ['la-lora']\nmodels = ['m']\npublic-size = true\n"
    b"[datasets.a]\nmax-epsilon = 2.0\n"
)

numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**63, 1e308, math.nan]))
scalars = st.one_of(numbers, st.booleans(), st.text(max_size=30))
wild = st.one_of(scalars, st.none(), st.lists(scalars, max_size=3), st.binary(max_size=20))


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """Bytes with one or a few pieces cut out, doubled or replaced."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 12))] = draw(st.binary(max_size=12))
    return bytes(data)


@fuzz
@given(text=st.one_of(st.binary(max_size=200), damaged(POLICY)))
def test_any_policy_file_is_read_or_a_config_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "policy.toml"
    path.write_bytes(text)
    try:
        found = read_policy_file(path, "a")
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    assert isinstance(found, Policy)
    assert found.limit.epsilon > 0
    assert 0 < found.limit.delta < 1
    assert 0 <= found.min_noise_multiplier < math.inf


@fuzz
@given(
    node=st.dictionaries(
        st.sampled_from(["max-epsilon", "delta", "public-size", "policy", "data-path", "x"]),
        scalars,
    )
)
def test_any_node_config_is_read_or_a_config_error(node):
    try:
        found = read_policy(node, 1e-5, public=False)
    except ConfigError:
        return
    assert found.limit.epsilon > 0
    assert 0 < found.limit.delta < 1


@fuzz
@given(
    node=st.dictionaries(
        st.sampled_from(["input-column", "label-column", "num-labels"]),
        st.one_of(scalars, st.sampled_from(["text", "label", 2])),
    )
)
def test_any_word_on_a_sites_columns_is_read_or_an_error_of_its_own(node):
    own = {"data-path": "/data", "max-epsilon": 8.0, "delta": 1e-5}
    simulated = {"partition-id": 0, "num-partitions": 2}
    for whole in (node | own, node | simulated):
        try:
            found = admit(RUN, whole, 1)
        except (ConfigError, PolicyError):
            continue
        assert found.client


@fuzz
@given(
    changes=st.dictionaries(st.one_of(st.sampled_from(sorted(DEFAULTS)), st.text(max_size=9)), wild)
)
def test_any_run_config_is_parsed_or_a_config_error(changes):
    try:
        found = parse({**DEFAULTS, **changes})
        method_of(found)
    except ConfigError as error:
        assert "\n" not in str(error).replace(repr(changes), "")  # noqa: PT017
        return
    assert isinstance(found, Config)
    assert found.num_server_rounds >= 1
    assert found.privacy.epsilon > 0


TOML = "".join(f"{key} = {value!r}\n" for key, value in DEFAULTS.items() if "." not in key).encode()


@fuzz
@given(text=damaged(TOML))
def test_any_run_config_of_toml_is_parsed_or_a_config_error(text):
    try:
        tables = tomllib.loads(text.decode("utf-8", "replace"))
    except tomllib.TOMLDecodeError:
        return
    try:
        parse({**DEFAULTS, **from_tables(tables)})
    except ConfigError:
        return


@fuzz
@given(text=st.one_of(st.text(max_size=60), damaged(b'{"method": "la-lora", "lora.rank": 8}')))
def test_any_run_config_on_the_wire_is_a_mapping_or_a_wire_error(text):
    plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
    content = RecordDict({messages.RUN_CONFIG: ConfigRecord({"run-config": plain})})
    try:
        found = messages.run_config_of(content)
    except tensors.WireError:
        return
    assert isinstance(found, dict)


values = st.one_of(
    *(st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=20), st.booleans()),
    *(st.binary(max_size=9), st.lists(st.integers(0, 9), max_size=3)),
)
keys = st.sampled_from(["run", "round", "attempt", "steps-left", "version-A", "version-B", "x"])


@fuzz
@given(order=st.dictionaries(keys, values))
def test_any_order_is_read_or_a_wire_error(order):
    content = RecordDict({messages.CONFIG: ConfigRecord(order)})
    try:
        found = messages.parse_request(content, RUN)
    except tensors.WireError:
        return
    assert 1 <= found.round <= RUN.num_server_rounds
    assert "/" not in found.run


LIKE = {"m.lora_A.weight": np.zeros((2, 5), np.float32), "m.lora_B.weight": np.ones((3, 2), "f4")}
BYTES = Array(LIKE["m.lora_A.weight"]).data


@fuzz
@given(
    data=st.one_of(st.binary(max_size=200), damaged(BYTES)),
    shape=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from(["float32", "float64", "object", "x"]),
    part=st.sampled_from([messages.ARRAYS, messages.DRIFT]),
)
def test_any_tensor_is_finite_or_a_wire_error(data, shape, dtype, part):
    record = {name: Array(array) for name, array in LIKE.items()}
    record["m.lora_A.weight"] = Array(dtype, tuple(shape), "numpy.ndarray", data)
    content = RecordDict({part: ArrayRecord(record)})
    read = messages.adapter_of if part == messages.ARRAYS else messages.drift_of
    try:
        found = read(content, LIKE)
    except tensors.WireError:
        return
    assert all(np.isfinite(array).all() for array in found.values())


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_an_integer_beyond_all_floats_is_an_error_and_no_crash(tmp_path, value):
    with pytest.raises(ConfigError):
        parse({**DEFAULTS, "train.lr-a": value})
    with pytest.raises(ConfigError):
        read_policy({"max-epsilon": 1.0, "delta": value}, 1e-5, public=False)
    path = tmp_path / "policy.toml"
    path.write_text(f"max-epsilon = 1.0\ndelta = {value}")
    with pytest.raises(ConfigError):
        read_policy_file(path)


@pytest.mark.parametrize("depth", [10**3, 10**5])
def test_deep_nesting_is_an_error_and_no_crash(tmp_path, depth):
    path = tmp_path / "policy.toml"
    path.write_text("max-epsilon = " + "[" * depth)
    with pytest.raises(ConfigError):
        read_policy_file(path)
    content = RecordDict({messages.RUN_CONFIG: ConfigRecord({"run-config": "[" * depth})})
    with pytest.raises(tensors.WireError):
        messages.run_config_of(content)
