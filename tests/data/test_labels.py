"""Labels as texts: names, booleans, floats; the classes of a dataset, and the refusals."""

import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import described
from lalora_app.data.examples import private_file, split, with_classes
from lalora_app.data.labels import class_of, is_integer, listed, positions, sorted_names, text_of
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.settings.value_rules import are_classes, class_name, class_names_in

NAMES = st.text(min_size=1).map(class_name).filter(lambda name: name and name != "auto")
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.floats(-1e9, 1e9).filter(float.is_integer),
    st.text(),
)


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def written(path, labels):
    rows = [{"text": f"dish number {i} was good", "label": x} for i, x in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True"),
        (0, "0"),
        (-3, "-3"),
        (1.0, "1"),
        (-0.0, "0"),
        ("1.0", "1"),
        ("0.", "0"),
        (" ham ", "ham"),
        ("01", "01"),
        ("01.0", "01.0"),
        ("1.5", "1.5"),
        ("NA", "NA"),
        ("null", "null"),
        (None, ""),
        (float("nan"), ""),
        ("  ", ""),
    ],
)
def test_the_text_of_a_label(value, text):
    assert text_of(value) == text


@pytest.mark.parametrize("value", [0.5, float("inf"), [1], {"a": 1}, b"x"])
def test_what_names_no_class_is_described(value):
    with pytest.raises(ValueError, match=r"^(the number|a ) ?\w"):
        text_of(value)


@given(VALUES, VALUES)
def test_two_labels_have_one_text_only_if_they_are_equal(one, two):
    """The oracle: equal as numbers of one kind, or equal texts but for spaces and a final .0."""

    def canonical(value):
        if isinstance(value, bool):
            return str(value)
        if isinstance(value, (int, float)):
            return int(value)
        stripped = value.strip()
        whole, dot, zeros = stripped.partition(".")
        head = whole if dot and not zeros.strip("0") else stripped
        plain = head.isascii() and head.lstrip("-").isdigit() and str(int(head)) in (head, head[1:])
        return int(head) if plain and head.count("-") <= 1 else stripped

    same = text_of(one) == text_of(two)
    assert same == (canonical(one) == canonical(two) or str(canonical(one)) == str(canonical(two)))


@given(st.lists(NAMES, min_size=2, unique=True))
def test_names_survive_the_key_of_the_config(names):
    text = listed(names)
    assert are_classes(text)
    assert class_names_in(text) == tuple(names)


def test_classes_are_sorted_as_numbers_if_all_are_numbers():
    assert sorted_names(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sorted_names(["10", "9", "b"]) == ("10", "9", "b")


def test_a_position_of_data_with_class_names_is_its_name():
    assert [class_of(i, ["a", "b"]) for i in (0, 1, -1, None)] == ["a", "b", None, None]
    with pytest.raises(ValueError, match="the class position 2, and the file names 2 classes"):
        class_of(2, ["a", "b"])


@pytest.mark.parametrize("names", [("ham", "spam"), ("spam", "ham")])
def test_the_order_of_the_names_is_the_order_of_the_positions(names):
    expected = (names.index("ham"), names.index("spam"), names.index("ham"))
    assert positions(["ham", "spam", "ham"], names) == expected


def test_integers_are_positions_only_among_names_that_are_none():
    assert positions(["1", "0"], ("ham", "spam")) == (1, 0)
    assert positions(["1", "0"], ("1", "0")) == (0, 1)
    with pytest.raises(DataError, match=r"^data\.labels: row 1 has label '0', .* '1', '2'$"):
        positions(["1", "0"], ("1", "2"))


def test_many_names_are_shortened_in_an_error():
    names = [f"c{i}" for i in range(100)]
    with pytest.raises(DataError, match=r"'c11' and 88 more$"):
        positions(["x"], names)


# --- the user's files of ../shared/cases ------------------------------------------------------

CASES = {
    "01 strings": (["ham", "spam"] * 30, {}, ("ham", "spam")),
    "01 strings in a chosen order": (["ham", "spam"] * 30, {"labels": "spam,ham"}, ("spam", "ham")),
    "07 stars": ([1, 2, 3, 4, 5] * 12, {}, ("1", "2", "3", "4", "5")),
    "07 stars, counted": ([1, 2, 3, 4, 5] * 12, {"num_labels": 5}, ("1", "2", "3", "4", "5")),
    "08 booleans": ([False, True] * 30, {}, ("False", "True")),
    "09 floats": ([0.0, 1.0] * 30, {}, ("0", "1")),
    "a class that never occurs": ([0, 2] * 30, {"num_labels": 3}, ("0", "1", "2")),
    "six labels for five stars": ([1, 2, 3, 4, 5] * 12, {"num_labels": 6}, tuple("012345")),
    "names of numbers": ([0, 1] * 30, {"labels": "ham,spam"}, ("ham", "spam")),
    "floats in a chosen order": ([0.0, 1.0] * 30, {"labels": "1.0,0.0"}, ("1", "0")),
    "names of floats": ([1.0, 2.0] * 30, {"labels": "1.0,2.0,3.0"}, ("1", "2", "3")),
    "versions": (["1.5", "2.0", "beta"] * 20, {}, ("1.5", "2", "beta")),
    "numbers that are named": (["0.5", "1"] * 30, {"labels": "0.5,1"}, ("0.5", "1")),
    "texts that other readers take for missing": (["NA", "null"] * 30, {}, ("NA", "null")),
}


@pytest.mark.parametrize("case", list(CASES))
def test_labels_are_taken_as_they_are(case, tmp_path):
    labels, changes, names = CASES[case]
    data = with_classes(
        described(written(tmp_path / "x.jsonl", labels), **{"num_labels": 0} | changes)
    )
    assert data.class_names == names
    assert data.num_labels == len(names)
    train, test = split(data)
    for part in (train, test):
        for content, position in zip(part.contents, part.labels, strict=True):
            label = text_of(labels[int(content.split()[2])])
            if label in names:
                assert names[position] == label
            else:
                assert position == int(label)


def test_02_a_missing_label_is_told_with_its_row(tmp_path):
    labels = [0, 1] * 30
    labels[7] = ""
    with pytest.raises(DataError, match=r'^data\.label-column="label": row 7 has no label$'):
        with_classes(described(written(tmp_path / "x.jsonl", labels), num_labels=0))


def test_a_number_of_classes_that_is_not_found_is_refused_with_the_names(tmp_path):
    path = written(tmp_path / "x.jsonl", ["a", "b", "c"] * 20)
    with pytest.raises(ConfigError, match=r"^data\.num-labels=2 must be 3, .*'a', 'b', 'c'$"):
        with_classes(described(path))


def test_one_class_must_be_named(tmp_path):
    path = written(tmp_path / "x.jsonl", ["a"] * 40)
    with pytest.raises(ConfigError, match=r'^data\.labels="auto" must find at least 2 .*\'a\';'):
        with_classes(described(path, num_labels=0))
    assert with_classes(described(path, num_labels=0, labels="a,b")).num_labels == 2


@pytest.mark.parametrize("labels", [["1", "0.25", "2.0"], ["1", "02"], ["-1", "+1"], ["1", "1e3"]])
def test_numbers_that_are_not_written_as_integers_are_no_classes_until_they_are_named(
    labels, tmp_path
):
    path = written(tmp_path / "x.jsonl", labels * 20)
    law = rf'^data\.label-column="label": row 1 has label {re.escape(labels[1])}, .* as integers'
    with pytest.raises(DataError, match=law):
        with_classes(described(path, num_labels=0))
    data = described(path, num_labels=0, labels=",".join(labels))
    train, test = split(with_classes(data))
    assert {*train.labels, *test.labels} == set(range(len(labels)))


def test_two_spellings_of_one_name_are_refused(tmp_path):
    assert not are_classes("1,1.0")
    for name, level in {"1": 50, "1.0": 200}.items():  # two folders
        (tmp_path / name).mkdir()
        for i in range(20):
            image = Image.fromarray(np.full((8, 8, 3), level + i, np.uint8))
            image.save(tmp_path / name / f"{i}.png")
    with pytest.raises(ConfigError, match=r"must find different names, and finds '1', '1'$"):
        with_classes(described(tmp_path, input_column="image", num_labels=0))


def test_folders_of_images_may_be_named_as_floats(tmp_path):
    for name, level in {"1.0": 50, "2.0": 200}.items():
        (tmp_path / name).mkdir()
        for i in range(20):
            image = Image.fromarray(np.full((8, 8, 3), level + i, np.uint8))
            image.save(tmp_path / name / f"{i}.png")
    data = with_classes(described(tmp_path, input_column="image", num_labels=0))
    assert data.class_names == ("1", "2")
    train, _ = split(data)
    lightness = [np.mean(pixels(content)) for content in train.contents]
    assert [mean > 100 for mean in lightness] == [label == 1 for label in train.labels]


def test_a_language_model_has_no_classes():
    data = described("/no/file", label_column="none", num_labels=0)
    assert with_classes(data) == data


def test_classes_named_once_are_named_the_same_again(tmp_path):
    path = written(tmp_path / "x.jsonl", ["b", "a"] * 20)
    data = with_classes(described(path, num_labels=0))
    assert with_classes(data) == data


def test_names_of_the_config_stay_as_they_are_written(tmp_path):
    path = written(tmp_path / "x.jsonl", [1.0, 0.0] * 20)
    data = with_classes(described(path, num_labels=0, labels="1.0, 0.0"))
    assert data.labels == "1.0, 0.0"
    assert data.class_names == ("1", "0")
    assert data.num_labels == 2


def test_a_client_s_row_with_an_unknown_class_is_refused(tmp_path):
    data = described("x", labels="a,b", num_labels=2)
    with pytest.raises(DataError, match=r"^data\.labels: row 0 has label 'c'") as caught:
        private_file(written(tmp_path / "own.jsonl", ["c", "a"]), data)
    assert caught.value.key == "data.labels"


def test_a_boolean_has_the_spelling_of_a_file_without_types(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\n" + "good,true\nbad,false\n" * 20, "utf-8")
    typed = written(tmp_path / "x.jsonl", [True, False] * 20)
    names = {"x.csv": ("false", "true"), "x.jsonl": ("False", "True")}
    assert with_classes(described(tmp_path / "x.csv", num_labels=0)).class_names == names["x.csv"]
    assert with_classes(described(typed, num_labels=0)).class_names == names["x.jsonl"]


def test_integers_are_recognised():
    assert all(map(is_integer, ["0", "-1", "10"]))
    assert not any(map(is_integer, ["01", "1.0", "", "x", "--1", "-0x"]))
