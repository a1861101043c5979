"""Examples: split by content or by the data itself, checked by row, and refused in one line."""

from collections import Counter

import numpy as np
import pytest

from conftest import described, make_config, one_line, written
from lalora_app.data import examples as datasets
from lalora_app.data.examples import Examples
from lalora_app.data.sources import DEMO
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.settings.run_config import BY_LABEL, PARTITIONERS


def counted(*parts):
    return Counter(pair for part in parts for pair in zip(part.contents, part.labels, strict=True))


@pytest.fixture(scope="module")
def rows():
    """200 rows over 50 texts: every text four times, with both labels."""
    return [{"text": f"text {i % 50}", "label": int(i % 4 == 0)} for i in range(200)]


GOOD = [{"text": f"words {i}", "label": i % 2} for i in range(20)]


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


def test_a_split_example_knows_its_row(rows, tmp_path):
    for side in datasets.split(described(written(tmp_path / "rows.jsonl", rows))):
        found = [(rows[i]["text"], rows[i]["label"]) for i in side.rows]
        assert found == list(zip(side.contents, side.labels, strict=True))
        half = side.take(range(0, len(side), 2)).take([3, 1])
        assert [half.row(0), half.row(1)] == [side.rows[6], side.rows[2]]


def test_examples_as_read_are_in_order():
    assert [Examples(("a", "b"), (0, 1)).row(i) for i in (0, 1)] == [0, 1]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_test_fraction_is_met(fraction):
    n = 4000
    share = np.mean([datasets.is_test(f"some text {i}", fraction) for i in range(n)])
    assert abs(share - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / n)


def test_a_larger_test_fraction_only_adds_texts():
    texts = [str(i) for i in range(500)]
    small, large = ({t for t in texts if datasets.is_test(t, f)} for f in (0.1, 0.3))
    assert small < large


def test_a_pair_is_split_by_both_of_its_texts():
    pairs = [(first, f"answer {i}") for first in ("one", "two") for i in range(200)]
    tested = [datasets.is_test(pair, 0.5) for pair in pairs]
    assert 0.4 < np.mean(tested) < 0.6
    assert tested[:200] != tested[200:]
    moved = [[(f"{i}a", "bc"), (f"{i}ab", "c")] for i in range(50)]
    assert any(datasets.is_test(one, 0.5) != datasets.is_test(two, 0.5) for one, two in moved)


def test_a_side_left_empty_is_an_error(tmp_path):
    path = written(tmp_path / "one.jsonl", [{"text": "the only one", "label": 0}])
    for fraction in (1e-9, 1 - 1e-9):
        with one_line("data.test-fraction", f"={fraction} leaves a side empty"):
            datasets.split(described(path, test_fraction=fraction))


def test_the_datas_own_test_split_is_taken_whole(rows, tmp_path):
    written(tmp_path / "train.jsonl", rows)
    written(tmp_path / "test.jsonl", GOOD)
    train, test = datasets.split(described(tmp_path, test_split="test"))
    assert counted(train) == Counter((row["text"], row["label"]) for row in rows)
    assert counted(test) == Counter((row["text"], row["label"]) for row in GOOD)


def test_a_test_split_is_checked_too_and_needs_no_clients(tmp_path):
    owned = [row | {"client": f"shop {i % 3}"} for i, row in enumerate(GOOD)]
    written(tmp_path / "train.jsonl", owned)
    written(tmp_path / "test.jsonl", GOOD)
    train, test = datasets.split(described(tmp_path, test_split="test", partitioner="natural-id"))
    assert train.groups == tuple(row["client"] for row in owned)
    assert test.groups == ()
    assert len(test) == len(GOOD)
    written(tmp_path / "test.jsonl", [{"text": "x", "label": 7}])
    with one_line("data.labels", ": row 0 has label '7', which must be one of '0', '1'"):
        datasets.split(described(tmp_path, test_split="test", test_fraction=0.3))


def test_a_test_split_that_would_be_the_training_data_is_refused(tmp_path):
    file = written(tmp_path / "train.jsonl", GOOD)
    for name in (file, DEMO):
        for split in ("train", "test"):
            with one_line("data.test-split", f'="{split}" must be "none": one file has one split'):
                datasets.split(described(name, test_split=split))
    with one_line("data.test-split", '="train" must be another than data.train-split'):
        datasets.split(described(tmp_path, test_split="train"))
    with one_line("data.name", "lost.jsonl", "must be an existing"):
        datasets.split(described(tmp_path / "lost.jsonl", test_split="test"))


def test_the_bundled_sms_set_is_whole():
    train, test = datasets.split(described(DEMO, test_fraction=0.1))
    assert len(train) + len(test) == 5574
    assert sum(train.labels) + sum(test.labels) == 747
    assert not set(train.contents) & set(test.contents)


# --- rows -------------------------------------------------------------------------------------


def test_pairs_of_texts_come_in_the_order_of_their_columns(tmp_path):
    rows = [{"question": f"q {i}", "sentence": f"s {i}", "label": i % 2} for i in range(30)]
    path = written(tmp_path / "pairs.jsonl", rows)
    for columns in ("question,sentence", " sentence , question "):
        first, second = (name.strip() for name in columns.split(","))
        train, test = datasets.split(described(path, input_column=columns))
        expected = Counter(((row[first], row[second]), row["label"]) for row in rows)
        assert counted(train, test) == expected


def test_one_text_of_a_pair_may_be_empty_and_not_both(tmp_path):
    rows = [{"question": f"q {i}", "sentence": "", "label": 0} for i in range(9)]
    data = {"input_column": "question,sentence"}
    train, test = datasets.split(described(written(tmp_path / "half.jsonl", rows), **data))
    assert len(train) + len(test) == 9
    rows.append({"question": " ", "sentence": "\t", "label": 0})
    with one_line("data.input-column", '="question,sentence": row 9 has no text'):
        datasets.split(described(written(tmp_path / "none.jsonl", rows), **data))


def test_without_a_label_column_every_label_is_0(tmp_path):
    path = written(tmp_path / "plain.jsonl", [{"text": f"words {i}"} for i in range(20)])
    train, test = datasets.split(described(path, label_column="none", partitioner="iid"))
    assert set(train.labels) | set(test.labels) == {0}
    assert len(train.labels) + len(test.labels) == 20


BAD = {
    "no text column": (GOOD, {"input_column": "body"}, "data.input-column", '="body" must be'),
    "no second text": (GOOD, {"input_column": "text,body"}, "data.input-column", '="body" must'),
    "no label column": (GOOD, {"label_column": "y"}, "data.label-column", '="y" must be'),
    "no client column": (GOOD, {"partitioner": "natural-id"}, "data.client-column", '="client"'),
    "empty text": ([*GOOD, {"text": "", "label": 0}], {}, "data.input-column", "row 20 has no"),
    "white text": ([*GOOD, {"text": " \n\t", "label": 0}], {}, "data.input-column", "row 20 has"),
    "missing text": ([*GOOD, {"text": None, "label": 0}], {}, "data.input-column", "row 20"),
    "number for a text": (
        [{"text": 5, "label": 0}],
        {},
        "data.input-column",
        "row 0 holds the number 5",
    ),
    "label outside": ([*GOOD, {"text": "x", "label": 2}], {}, "data.labels", "has label '2'"),
    "negative label": ([*GOOD, {"text": "x", "label": -1}], {}, "data.labels", "label '-1'"),
    "missing label": (
        [*GOOD, {"text": "x", "label": None}],
        {},
        "data.label-column",
        "row 20 has no",
    ),
    "empty label": ([{"text": "x", "label": " "}], {}, "data.label-column", "row 0 has no label"),
    "text label": ([{"text": "x", "label": "spam"}], {}, "data.labels", "label 'spam'"),
    "float label": (
        [{"text": "x", "label": 0.5}],
        {},
        "data.label-column",
        "the number 0.5, which",
    ),
    "list label": ([{"text": "x", "label": [1]}], {}, "data.label-column", "a list as its label"),
    "boolean label": ([{"text": "x", "label": True}], {}, "data.labels", "label 'True'"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_data_is_one_line_that_names_key_and_value(case, tmp_path):
    content, changes, key, words = BAD[case]
    path = written(tmp_path / "bad.jsonl", content)
    with one_line(key, words):
        datasets.split(described(path, **changes))


@pytest.mark.parametrize("columns", ["a,b,c", "a,", ",a", ",", " "])
def test_an_input_is_one_column_or_two(columns):
    with pytest.raises(ConfigError, match=f"data.input-column='{columns}' must name one column"):
        make_config(**{"data.input-column": columns})
    for fine in ("a", "a,b", " a , b "):
        make_config(**{"data.input-column": fine})


LANGUAGE = {"model.task": "causal-lm", "model.pooling": "model", "data.label-column": "none"}


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_only_deals_that_need_no_labels_go_without_them(partitioner):
    changes = LANGUAGE | {"data.partitioner": partitioner}
    if partitioner not in BY_LABEL:
        assert make_config(**changes).data.label_column == "none"
        return
    with pytest.raises(ConfigError) as caught:
        make_config(**changes)
    assert str(caught.value) == (
        f'data.partitioner="{partitioner}" must be one that needs no labels while '
        'data.label-column="none"'
    )


@pytest.mark.parametrize("task", ["text-classification", "image-classification"])
def test_a_classifier_needs_labels(task):
    changes = LANGUAGE | {"model.task": task, "data.partitioner": "iid"}
    with pytest.raises(ConfigError, match=f'data.label-column="none" must name .* for "{task}"'):
        make_config(**changes)


# --- clients ----------------------------------------------------------------------------------


def test_a_private_file_is_not_split(tmp_path):
    path = written(tmp_path / "own.jsonl", GOOD)
    own = datasets.private_file(str(path), described(DEMO))
    assert counted(own) == Counter((row["text"], row["label"]) for row in GOOD)
    with one_line("data-path", "missing.csv"):
        datasets.private_file(str(tmp_path / "missing.csv"), described(DEMO))


def test_a_private_file_needs_no_client_column(tmp_path):
    path = written(tmp_path / "own.jsonl", GOOD)
    own = datasets.private_file(str(path), described(DEMO, partitioner="natural-id"))
    assert (len(own), own.groups) == (len(GOOD), ())


def test_a_private_file_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError("the hub was asked for a private path")

    monkeypatch.setattr("lalora_app.data.sources._load_hub", ask)
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "own.jsonl", GOOD)
    assert len(datasets.private_file("own.jsonl", described(DEMO))) == len(GOOD)
    for name in ("nobody/private", DEMO):
        with one_line("data-path", name.split("/")[-1]):
            datasets.private_file(name, described(DEMO))


def test_limits_of_a_client():
    datasets.check_client(8, batch_size=8, delta=0.1249)
    with pytest.raises(DataError, match=r"train\.batch-size=9") as caught:
        datasets.check_client(8, batch_size=9, delta=1e-5)
    assert caught.value.key == "train.batch-size"
    assert "8" not in str(caught.value)  # the size itself is nobody's business
    with one_line("privacy.delta", "=0.125 must be below 1/n"):
        datasets.check_client(8, batch_size=8, delta=0.125)
