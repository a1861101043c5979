"""What crosses the wire survives it; what should not be there is a WireError, and only that."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_config
from helpers.fake_grid import identify, over_the_wire
from lalora_app.adapter.factors import num_bytes, select
from lalora_app.methods.table import METHODS
from lalora_app.models import backbone
from lalora_app.wire import code_version, messages, refusals, tensors
from lalora_app.wire.messages import SiteHello, TrainReply, TrainRequest
from lalora_app.wire.same_model import MODEL
from lalora_app.wire.tensors import WireError

ROUNDS, STEPS = 10, 2
RUN = make_config(**{"num-server-rounds": ROUNDS, "train.local-steps": STEPS})
HASHES = {"weights": "0" * 64, "tokenizer": "f" * 64}
A, B, HEAD = "m.lora_A.weight", "m.lora_B.weight", "classifier.bias"
fuzz = settings(deadline=None, database=None, derandomize=True, max_examples=300)


def adapter():
    rng = np.random.default_rng(0)
    shapes = {A: (2, 5), B: (3, 2), HEAD: (2,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def claiming_float32(data, shape=(2, 5)):
    """An Array whose header says what the receiver wants, whatever its bytes are."""
    return Array("float32", shape, "numpy.ndarray", data)


def with_a(array):
    return ArrayRecord({A: array, **{n: Array(v) for n, v in adapter().items() if n != A}})


def order(**changes):
    values = {
        "run": "la-lora-20260101-000000-abcdef",
        "round": 2,
        "attempt": 3,
        "steps-left": 4,
        "task-steps-left": 4,
        "version-A": 0,
        "version-B": 1,
    }
    changed = {**values, **changes}
    return RecordDict(
        {messages.CONFIG: ConfigRecord({k: v for k, v in changed.items() if v is not None})}
    )


def answer(content):
    identify()
    request = Message(RecordDict(), dst_node_id=7, message_type="train", group_id="1")
    return over_the_wire(Message(content, reply_to=request))


def reply(upload=None, **changes):
    values = {"round": 3, "epsilon": 1.25, "num_examples": None} | changes
    return TrainReply(upload or {B: adapter()[B]}, **values)


# --- adapters ---------------------------------------------------------------------------------


def test_adapter_survives_the_wire_bit_for_bit():
    sent = adapter()
    got = over_the_wire(answer(RecordDict({messages.ARRAYS: tensors.to_record(sent)})))
    back = tensors.from_record(got.content.array_records[messages.ARRAYS], sent)
    assert list(back) == list(sent)
    for name, array in sent.items():
        assert back[name].dtype == np.float32
        assert back[name].tobytes() == array.tobytes()


def test_a_transposed_view_travels_as_its_values():
    sent = {A: np.arange(10, dtype=np.float32).reshape(5, 2).T}
    assert np.array_equal(tensors.from_record(tensors.to_record(sent), sent)[A], sent[A])


def bf16_bytes():
    return np.zeros((2, 5), np.dtype("V2"))


def unfit_arrays():
    good = adapter()[A]
    nan, inf = good.copy(), good.copy()
    nan[1, 3], inf[0, 0] = np.nan, -np.inf
    return {
        "float64": Array(good.astype(np.float64)),
        "float16": Array(good.astype(np.float16)),
        "int32": Array(good.astype(np.int32)),
        "transposed": Array(good.T.copy()),
        "broadcastable": Array(good[:1]),
        "scalar": Array(np.zeros((), np.float32)),
        "one too many": Array(np.zeros((2, 6), np.float32)),
        "nan": Array(nan),
        "inf": Array(inf),
        "float64 under a float32 header": claiming_float32(npy(good.astype(np.float64))),
        "wrong shape under a right header": claiming_float32(npy(good.T)),
        "big-endian under a right header": claiming_float32(npy(good.astype(">f4"))),
        "bf16": Array("bfloat16", (2, 5), "numpy.ndarray", npy(bf16_bytes())),
        "bf16 as garbage": claiming_float32(npy(bf16_bytes())),
        "objects": claiming_float32(npy(good.astype(object), allow_pickle=True)),
        "pickle": claiming_float32(b"\x80\x04K\x01."),
        "truncated": claiming_float32(npy(good)[:-1]),
        "truncated header": claiming_float32(npy(good)[:20]),
        "empty": claiming_float32(b""),
        "other serialisation": Array("float32", (2, 5), "torch.tensor", npy(good)),
    }


@pytest.mark.parametrize("case", list(unfit_arrays()))
def test_an_unfit_array_is_a_wire_error_that_names_it(case):
    with pytest.raises(WireError, match=r"m\.lora_A\.weight"):
        tensors.from_record(with_a(unfit_arrays()[case]), adapter())


def header(text):
    line = text.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line


def crafted_bytes():
    """Bytes at which np.load raises something else than ValueError, OSError or EOFError."""
    npz = io.BytesIO()
    np.savez(npz, adapter()[A])
    shape = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }"
    return {
        "a whole npz archive": npz.getvalue(),  # np.load returns no array
        "the start of a zip": b"PK\x03\x04 and no archive",  # BadZipFile
        "an empty descr": header("{'descr': (), 'fortran_order': False, 'shape': (2, 5), }"),
        "an open bracket": header("{'descr': '<f4', 'shape': ("),  # TokenError
        "a deep expression": header("-" * 9000 + "1"),  # MemoryError, RecursionError
        "a shape of 4 TiB": header(shape % 10**12),  # MemoryError
        "a shape beyond 64 bits": header(shape % 10**30),  # OverflowError
    }


@pytest.mark.parametrize("case", list(crafted_bytes()))
def test_crafted_bytes_are_a_wire_error_too(case):
    with pytest.raises(WireError, match=r"m\.lora_A\.weight"):
        tensors.from_record(with_a(claiming_float32(crafted_bytes()[case])), adapter())


def test_missing_and_unexpected_tensors_are_named():
    like = adapter()
    with pytest.raises(WireError, match=r"m\.lora_B\.weight is missing"):
        tensors.from_record(tensors.to_record({n: a for n, a in like.items() if n != B}), like)
    extra = {**like, "m.lora_C.weight": like[A]}
    with pytest.raises(WireError, match=r"m\.lora_C\.weight is unexpected"):
        tensors.from_record(tensors.to_record(extra), like)


@fuzz
@given(data=st.binary(max_size=300))
def test_any_bytes_in_an_array_give_only_a_wire_error(data):
    with pytest.raises(WireError, match=r"m\.lora_A\.weight"):
        tensors.from_record(with_a(claiming_float32(data)), adapter())


@fuzz
@given(
    position=st.integers(0, 167),
    cut=st.integers(0, 4),
    insert=st.one_of(st.binary(max_size=6), st.sampled_from([b"(", b"L", b"'", b"PK\x03\x04"])),
)
def test_a_damaged_array_gives_a_wire_error_or_finite_numbers(position, cut, insert):
    whole = npy(adapter()[A])
    assert len(whole) == 168
    damaged = whole[:position] + insert + whole[position + cut :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about files of Python 2
        try:
            got = tensors.from_record(with_a(claiming_float32(damaged)), adapter())
        except WireError as error:
            assert A in str(error)  # noqa: PT017
            return
    assert got[A].shape == (2, 5)
    assert got[A].dtype == np.float32
    assert np.isfinite(got[A]).all()


def test_upload_of_la_lora_is_b_and_head_to_the_byte(tiny):
    start = backbone.build(tiny(**{"lora.rank": 2}))[1]
    hidden, rank, layers, targets, labels = 16, 2, 2, 2, 2
    b_sizes = layers * targets * hidden * rank
    head = labels * hidden + labels
    upload = select(start, METHODS["la-lora"].syncs(1))
    assert num_bytes(upload) == 4 * (b_sizes + head)
    assert num_bytes(start) == 4 * (2 * b_sizes + head)
    assert num_bytes(select(start, METHODS["dp-lora"].syncs(1))) == num_bytes(start)


# --- requests ---------------------------------------------------------------------------------


def test_request_survives_the_wire():
    sent = TrainRequest(
        run="la-lora-1",
        round=3,
        attempt=4,
        steps_left=12,
        task_steps_left=12,
        versions={"A": 1, "B": 2},
    )
    content = answer(RecordDict({messages.CONFIG: sent.record()})).content
    assert messages.parse_request(content, RUN) == sent


@pytest.mark.parametrize(
    "run",
    [
        *("../up", "..", ".", ".hidden", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "a b", ""),
        *("-rf", "ü", "x" * 101, 1, True, b"run", ["run"], None),
    ],
)
def test_a_run_name_is_a_plain_name(run):
    with pytest.raises(WireError, match=r"\Arun="):
        messages.parse_request(order(run=run), RUN)


@pytest.mark.parametrize(
    ("key", "smallest"),
    [
        *(("round", 1), ("attempt", 1), ("steps-left", 1), ("task-steps-left", 1)),
        *(("version-A", 0), ("version-B", 0)),
    ],
)
def test_numbers_of_a_request(key, smallest):
    assert messages.parse_request(order(**{key: smallest}), RUN)
    for bad in (smallest - 1, -(10**9), True, False, 1.0, float("nan"), "1", [1], None):
        with pytest.raises(WireError, match=rf"\A{key}="):
            messages.parse_request(order(**{key: bad}), RUN)


@pytest.mark.parametrize(
    ("key", "largest"),
    [
        *(("round", ROUNDS), ("attempt", ROUNDS), ("steps-left", ROUNDS * STEPS)),
        *(("task-steps-left", ROUNDS * STEPS), ("version-A", ROUNDS), ("version-B", ROUNDS)),
    ],
)
def test_a_request_keeps_to_the_runs_own_number_of_rounds(key, largest):
    assert messages.parse_request(order(**{key: largest}), RUN)
    for bad in (largest + 1, 10**6, 2**62):
        with pytest.raises(WireError, match=rf"\A{key}={bad} must be at most {largest}"):
            messages.parse_request(order(**{key: bad}), RUN)


def test_a_request_without_its_record_is_a_wire_error():
    for content in (RecordDict(), RecordDict({messages.CONFIG: MetricRecord({"round": 1})})):
        with pytest.raises(WireError, match="run="):
            messages.parse_request(content, RUN)


scalars = st.one_of(
    *(st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=9), st.booleans())
)
values = st.one_of(
    scalars,
    *(st.lists(kind, max_size=3) for kind in (st.integers(), st.text(max_size=5), st.booleans())),
)
keys = st.sampled_from(
    ["run", "round", "attempt", "steps-left", "task-steps-left", "version-A", "version-B", "x"]
)


@fuzz
@given(changes=st.dictionaries(keys, values, max_size=3))
def test_any_request_is_read_or_a_wire_error(changes):
    content = order(**changes)
    try:
        request = messages.parse_request(content, RUN)
    except WireError as error:
        assert any(str(error).startswith(f"{key}=") for key in changes)  # noqa: PT017
        return
    counts = (request.round, request.attempt, request.steps_left, request.task_steps_left)
    assert all(type(n) is int for n in (*counts, *request.versions.values()))
    assert min(counts) >= 1
    assert set(request.versions) == {"A", "B"}
    assert min(request.versions.values()) >= 0
    assert Path("folder", request.run).parent == Path("folder")
    assert Path("folder", request.run).name == request.run


# --- replies ----------------------------------------------------------------------------------


def expected():
    return {B: adapter()[B]}


@pytest.mark.parametrize("size", [None, 17])
def test_reply_survives_the_wire(size):
    sent = reply(num_examples=size)
    got = messages.parse_reply(answer(sent.record()), expected(), 3)
    assert (got.round, got.epsilon, got.num_examples) == (3, 1.25, size)
    assert list(got.upload) == [B]
    assert got.upload[B].tobytes() == sent.upload[B].tobytes()


@pytest.mark.parametrize("t", [2, 4])
def test_a_reply_to_another_round_is_stale(t):
    with pytest.raises(WireError, match="stale"):
        messages.parse_reply(answer(reply().record()), expected(), t)


def test_a_reply_of_other_code_is_no_reply():
    for code in ("0" * 64, "", code_version.code_hash()[:-1]):
        content = reply().record()
        content.config_records[messages.CONFIG]["code"] = code
        with pytest.raises(WireError, match="other code"):
            messages.parse_reply(answer(content), expected(), 3)
    del content.config_records[messages.CONFIG]["code"]
    with pytest.raises(WireError, match="other code"):
        messages.parse_reply(answer(content), expected(), 3)


@pytest.mark.parametrize("spent", [-0.01, float("nan"), -float("inf"), [1.0], None])
def test_an_epsilon_is_a_number_of_at_least_0(spent):
    content = reply().record()
    del content.metric_records[messages.METRICS]["epsilon"]
    if spent is not None:
        content.metric_records[messages.METRICS]["epsilon"] = spent
    with pytest.raises(WireError, match="epsilon="):
        messages.parse_reply(answer(content), expected(), 3)


@pytest.mark.parametrize("size", [0, -5, 3.0, [3]])
def test_a_size_is_a_positive_integer(size):
    content = reply().record()
    content.metric_records[messages.METRICS]["num-examples"] = size
    with pytest.raises(WireError, match="num-examples="):
        messages.parse_reply(answer(content), expected(), 3)


@pytest.mark.parametrize("name", [messages.ARRAYS, messages.METRICS, messages.CONFIG])
def test_a_reply_without_one_of_its_records_is_no_reply(name):
    content = reply().record()
    del content[name]
    with pytest.raises(WireError):
        messages.parse_reply(answer(content), expected(), 3)


def test_a_reply_holds_the_synced_factors_only():
    both = {B: adapter()[B], HEAD: adapter()[HEAD]}
    with pytest.raises(WireError, match=r"m\.lora_A\.weight is unexpected"):
        messages.parse_reply(answer(reply(adapter()).record()), both, 3)
    with pytest.raises(WireError, match=r"classifier\.bias is missing"):
        messages.parse_reply(answer(reply(expected()).record()), both, 3)


def test_an_error_message_is_told_without_its_text():
    identify()
    request = Message(RecordDict(), dst_node_id=7, message_type="train")
    failed = over_the_wire(Message(Error(2, "ValueError: SECRET-7"), reply_to=request))
    with pytest.raises(WireError, match="error 2") as caught:
        messages.parse_reply(failed, expected(), 3)
    assert "SECRET" not in str(caught.value)
    with pytest.raises(WireError, match="error 2"):
        messages.parse_hello(failed)


@pytest.mark.parametrize("key", list(refusals.REFUSALS))
def test_a_refusal_is_one_fixed_sentence(key):
    content = messages.refusal(key)
    assert {name: dict(record) for name, record in content.items()} == {
        messages.CONFIG: {"refusal": key}
    }
    for parse in (messages.parse_hello, lambda m: messages.parse_reply(m, expected(), 3)):
        with pytest.raises(WireError) as caught:
            parse(answer(content))
        assert str(caught.value) == f"refused: {messages.REFUSALS[key]}"


@pytest.mark.parametrize("key", ["row 17 holds SECRET-7", "", "Budget"])
def test_no_refusal_says_anything_else(key):
    assert dict(messages.refusal(key)[messages.CONFIG]) == {"refusal": "internal"}
    content = RecordDict({messages.CONFIG: ConfigRecord({"refusal": key})})
    with pytest.raises(WireError) as caught:
        messages.parse_hello(answer(content))
    assert str(caught.value) == f"refused: {messages.REFUSALS['internal']}"


def test_hello_survives_the_wire():
    got = answer(SiteHello("clinic-7", 4, HASHES).record())
    assert messages.parse_hello(got) == SiteHello("clinic-7", 4, HASHES)
    assert {name: set(record) for name, record in got.content.items()} == {
        messages.CONFIG: {"client", "rank", "code"},
        MODEL: set(HASHES),
    }


@pytest.mark.parametrize("name", ["", 7, True, ["a"], None])
def test_a_hello_needs_a_name(name):
    content = SiteHello("x", 4, HASHES).record()
    del content.config_records[messages.CONFIG]["client"]
    if name is not None:
        content.config_records[messages.CONFIG]["client"] = name
    with pytest.raises(WireError, match="client must be a name"):
        messages.parse_hello(answer(content))


@pytest.mark.parametrize("rank", [0, 6])
def test_a_drift_of_an_impossible_rank_is_refused(rank):
    """Rank 0 was once a NameError of ours: found by fuzzing."""
    like = {"l.lora_A.weight": np.zeros((2, 5), "f4"), "l.lora_B.weight": np.zeros((7, 2), "f4")}
    drift = {
        "l.lora_A.weight": np.zeros((rank, 5), "f4"),
        "l.lora_B.weight": np.zeros((7, rank), "f4"),
    }
    content = RecordDict({messages.DRIFT: tensors.to_record(drift)})
    with pytest.raises(WireError, match=f"has rank {rank}, which must be 1 to 5"):
        messages.drift_of(content, like)


@pytest.mark.parametrize(("sent", "largest"), [(2, 2), (2, 5), (1, 1)])
def test_the_rank_of_a_request_is_that_of_its_factors(sent, largest):
    record = tensors.to_record({A: np.zeros((sent, 5), np.float32), HEAD: np.zeros(2, np.float32)})
    content = RecordDict({messages.ARRAYS: record})
    assert messages.rank_of(content, largest) == sent


@pytest.mark.parametrize("shape", [(0, 5), (3, 5)])
def test_a_rank_beyond_the_clients_own_is_refused(shape):
    record = tensors.to_record({A: np.zeros(shape, np.float32)})
    with pytest.raises(WireError, match=rf"have rank {shape[0]}, which must be 1 to 2"):
        messages.rank_of(RecordDict({messages.ARRAYS: record}), 2)


@pytest.mark.parametrize("arrays", [{}, {HEAD: np.zeros(2)}, {A: np.zeros(4)}])
def test_without_a_readable_factor_the_rank_is_the_clients_own(arrays):
    record = ArrayRecord({name: Array(x.astype(np.float32)) for name, x in arrays.items()})
    assert messages.rank_of(RecordDict({messages.ARRAYS: record}), 3) == 3
