"""Datasets: split by content, dealt once, padded right, and refused with a line."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import WORDS
from lalora_app import data as datasets
from lalora_app.config import ConfigError, Data
from lalora_app.data import Examples
from lalora_app.encoding import EncodedTexts, encode_texts
from lalora_app.partition import partition
from lalora_app.sources import DEMO, DataError

INF = float("inf")


def described(name, **changes):
    defaults = {
        "subset": "none",
        "train_split": "train",
        "test_split": "none",
        "input_column": "text",
        "label_column": "label",
        "num_labels": 2,
        "test_fraction": 0.2,
        "partitioner": "dirichlet",
        "dirichlet_alpha": INF,
        "classes_per_client": 2,
        "shards_per_client": 2,
        "client_column": "client",
        "public_size": False,
    }
    return Data(name=str(name), **defaults | changes)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def counted(*parts):
    return Counter(pair for part in parts for pair in zip(part.contents, part.labels, strict=True))


@pytest.fixture(scope="module")
def rows():
    """200 rows over 50 texts: every text four times, with both labels."""
    return [{"text": f"text {i % 50}", "label": int(i % 4 == 0)} for i in range(200)]


# --- split ------------------------------------------------------------------------------------


def test_split_loses_nothing_and_keeps_copies_together(rows, tmp_path):
    data = described(written(tmp_path / "rows.jsonl", rows))
    train, test = datasets.split(data)
    assert counted(train, test) == Counter((row["text"], row["label"]) for row in rows)
    assert not set(train.contents) & set(test.contents)
    assert train.contents
    assert test.contents


def test_split_follows_content_not_order(rows, tmp_path):
    one = datasets.split(described(written(tmp_path / "a.jsonl", rows)))
    other = datasets.split(described(written(tmp_path / "b.jsonl", rows[::-1])))
    for side in (0, 1):
        assert counted(one[side]) == counted(other[side])


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_test_fraction_is_met(fraction):
    n = 4000
    share = np.mean([datasets.is_test(f"some text {i}", fraction) for i in range(n)])
    assert abs(share - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / n)


def test_a_larger_test_fraction_only_adds_texts():
    texts = [str(i) for i in range(500)]
    small, large = ({t for t in texts if datasets.is_test(t, f)} for f in (0.1, 0.3))
    assert small < large


def test_a_side_left_empty_is_an_error(tmp_path):
    path = written(tmp_path / "one.jsonl", [{"text": "the only one", "label": 0}])
    for fraction in (1e-9, 1 - 1e-9):
        with pytest.raises(DataError, match=f"data.test-fraction={fraction} leaves a side empty"):
            datasets.split(described(path, test_fraction=fraction))


# --- partition --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [INF, 1e9, 0.5, 0.01])
@pytest.mark.parametrize("clients", [1, 3, 7])
def test_partition_deals_the_train_split_exactly_once(tiny_data, alpha, clients):
    data = described(tiny_data, dirichlet_alpha=alpha)
    parts = partition(data, 0, clients)
    assert len(parts) == clients
    assert counted(*parts) == counted(datasets.split(data)[0])


def shares(parts):
    return np.array([np.mean(part.labels) for part in parts if len(part)])


def test_a_large_alpha_balances_and_a_small_one_skews(tiny_data):
    labels = datasets.split(described(tiny_data))[0].labels
    even = partition(described(tiny_data, dirichlet_alpha=1e9), 0, 4)
    assert np.abs(shares(even) - np.mean(labels)).max() < 0.02
    assert max(map(len, even)) - min(map(len, even)) <= 4
    skewed = partition(described(tiny_data, dirichlet_alpha=0.05), 0, 4)
    assert np.ptp(shares(skewed)) > 0.5


def test_iid_parts_have_equal_sizes_and_mixed_labels(tiny_data):
    parts = partition(described(tiny_data), 0, 4)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    mean = np.mean(datasets.split(described(tiny_data))[0].labels)
    assert np.abs(shares(parts) - mean).max() < 0.2


@pytest.mark.parametrize("alpha", [INF, 0.5])
def test_the_deal_follows_the_seed(tiny_data, alpha):
    data = described(tiny_data, dirichlet_alpha=alpha)
    deal = partition.__wrapped__  # past the cache
    assert deal(data, 1, 3) == deal(data, 1, 3)
    assert deal(data, 1, 3) != deal(data, 2, 3)


def test_a_client_may_come_out_empty_and_is_then_refused(tiny_data):
    parts = partition(described(tiny_data, dirichlet_alpha=1e-3), 0, 30)
    assert counted(*parts) == counted(datasets.split(described(tiny_data))[0])
    assert not all(map(len, parts))
    with pytest.raises(DataError, match="at least one example") as caught:
        datasets.check_client(0, batch_size=1, delta=1e-5)
    assert caught.value.key == "data"


def test_limits_of_a_client():
    datasets.check_client(8, batch_size=8, delta=0.1249)
    with pytest.raises(DataError, match=r"train\.batch-size=9") as caught:
        datasets.check_client(8, batch_size=9, delta=1e-5)
    assert caught.value.key == "train.batch-size"
    assert "8" not in str(caught.value)  # the size itself is nobody's business
    with pytest.raises(DataError, match=r"privacy.delta=0.125 must be below 1/n") as caught:
        datasets.check_client(8, batch_size=8, delta=0.125)
    assert caught.value.key == "privacy.delta"


# --- batches ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded():
    tokens = ((5, 6, 7), (1,), (2, 3), (9, 9, 9, 9, 9), (4, 4))
    return EncodedTexts(tokens, (0, 1, 0, 1, 1), pad=99)


def test_a_batch_is_padded_to_its_longest_and_masked(encoded):
    batch = encoded.batch([2, 0, 1])
    assert batch.inputs.tolist() == [[2, 3, 99], [5, 6, 7], [1, 99, 99]]
    assert batch.mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [0, 0, 1]
    assert {batch.inputs.dtype, batch.mask.dtype, batch.labels.dtype} == {torch.long}
    assert encoded.batch(np.array([1])).inputs.tolist() == [[1]]


def test_a_pad_token_in_a_text_is_not_masked():
    batch = EncodedTexts(((99, 5, 99), (1,)), (0, 0), pad=99).batch([0, 1])
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_batches_yield_every_example_once(encoded, size):
    batches = list(encoded.batches(size))
    assert [len(b.labels) for b in batches[:-1]] == [size] * (len(batches) - 1)
    rows = [
        (tuple(ids[mask.bool()].tolist()), int(label))
        for b in batches
        for ids, mask, label in zip(b.inputs, b.mask, b.labels, strict=True)
    ]
    assert sorted(rows) == sorted(zip(encoded.tokens, encoded.labels, strict=True))
    widths = [b.inputs.shape[1] for b in batches]
    assert widths == sorted(widths)


def test_encode_cuts_at_max_length(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    examples = Examples(("free prize", "hello dear friend see you later"), (1, 0))
    got = encode_texts(examples, tokenizer, 5)
    cls, sep = WORDS.index("[CLS]"), WORDS.index("[SEP]")
    free, prize = WORDS.index("free"), WORDS.index("prize")
    hello = [WORDS.index(word) for word in ("hello", "dear", "friend")]
    assert got.tokens == ((cls, free, prize, sep), (cls, *hello, sep))
    assert (got.labels, got.pad, len(got)) == ((1, 0), WORDS.index("[PAD]"), 2)


# --- sources and errors -----------------------------------------------------------------------


def test_the_bundled_sms_set_is_whole():
    train, test = datasets.split(described(DEMO, test_fraction=0.1))
    assert len(train) + len(test) == 5574
    assert sum(train.labels) + sum(test.labels) == 747
    assert not set(train.contents) & set(test.contents)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of datasets' CSV reader
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_csv_and_parquet_are_read_like_jsonl(tmp_path, rows):
    from datasets import Dataset

    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    expected = datasets.split(described(written(tmp_path / "rows.jsonl", rows)))
    for name in ("rows.csv", "rows.parquet"):
        assert datasets.split(described(tmp_path / name)) == expected


GOOD = [{"text": f"words {i}", "label": i % 2} for i in range(20)]
BAD = {
    "no such file": (
        None,
        {},
        "data.name",
        "must be an existing folder, or a file ending in",
    ),
    "no text column": (GOOD, {"input_column": "body"}, "data.input-column", '="body" must be'),
    "no label column": (GOOD, {"label_column": "y"}, "data.label-column", '="y" must be'),
    "empty text": ([*GOOD, {"text": " ", "label": 0}], {}, "data.input-column", "row 20 has no"),
    "missing text": ([*GOOD, {"text": None, "label": 0}], {}, "data.input-column", "row 20"),
    "label outside": ([*GOOD, {"text": "x", "label": 2}], {}, "data.num-labels", "has label 2"),
    "negative label": ([*GOOD, {"text": "x", "label": -1}], {}, "data.num-labels", "label -1"),
    "missing label": ([*GOOD, {"text": "x", "label": None}], {}, "data.num-labels", "row 20"),
    "text label": ([{"text": "x", "label": "spam"}], {}, "data.num-labels", "label 'spam'"),
    "float label": ([{"text": "x", "label": 0.5}], {}, "data.num-labels", "label 0.5"),
    "boolean label": ([{"text": "x", "label": True}], {}, "data.num-labels", "label True"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_data_is_one_line_that_names_key_and_value(case, tmp_path):
    content, changes, key, words = BAD[case]
    path = tmp_path / "bad.jsonl"
    if content is not None:
        written(path, content)
    with pytest.raises(DataError) as caught:
        datasets.split(described(path, **changes))
    message = str(caught.value)
    assert message.startswith(key + "=")
    assert words in message
    assert "\n" not in message
    assert caught.value.key == key


def test_an_unknown_ending_is_an_error(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("x", "utf-8")
    with pytest.raises(DataError, match=r"data.name=.*\.jsonl, \.json, \.csv, \.parquet"):
        datasets.split(described(path))


@pytest.mark.parametrize("content", ["", "{ no json\n", '{"text": "a", "label": 0}\n[1]\n'])
def test_a_damaged_file_is_one_line_too(tmp_path, content):
    path = tmp_path / "damaged.jsonl"
    path.write_text(content, "utf-8")
    with pytest.raises(ConfigError) as caught:
        datasets.split(described(path))
    assert str(caught.value).startswith("data.name=")
    assert "\n" not in str(caught.value)


def test_a_private_file_is_not_split(tmp_path):
    path = written(tmp_path / "own.jsonl", GOOD)
    own = datasets.private_file(str(path), described(DEMO))
    assert counted(own) == Counter((row["text"], row["label"]) for row in GOOD)
    with pytest.raises(DataError, match="data-path=") as caught:
        datasets.private_file(str(tmp_path / "missing.csv"), described(DEMO))
    assert caught.value.key == "data-path"
