"""Where data comes from: files, folders and the hub, read alike, and refused in one line."""

import ast
import csv
import io
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pictures

from conftest import ROOT, SHARED, described, one_line, written
from lalora_app.data import sources
from lalora_app.data.examples import split, with_classes
from lalora_app.data.sources import DEMO, read
from lalora_app.settings import errors
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.settings.names import is_local
from lalora_app.wire.refusals import REFUSALS

WANTED = {"text": "data.input-column", "label": "data.label-column"}
TRAIN = [{"text": f"train, {i}", "label": i % 2} for i in range(12)]
VALIDATION = [{"text": f"validation {i}", "label": 1} for i in range(5)]

# of datasets' CSV reader
csv_warnings = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
pytestmark = csv_warnings


def write(path: Path, rows: list[dict]) -> None:
    """Write the rows in the format that the path ends in, by plain means where there are some."""
    from datasets import Dataset

    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    else:
        written(path, rows)


def columns(rows: list[dict], ending: str = "") -> dict[str, list]:
    """The columns; those of a delimited file are texts."""
    as_read = str if ending == ".csv" else (lambda value: value)
    return {name: [as_read(row[name]) for row in rows] for name in WANTED}


def read_local(path: Path, part: str = "train", wanted=WANTED, key: str = "data.name"):
    return read(key, str(path), "none", part, wanted)


# --- files and folders ------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_is_all_of_its_split(ending, tmp_path):
    write(tmp_path / f"rows{ending}", TRAIN)
    for part in ("train", "anything"):
        assert read_local(tmp_path / f"rows{ending}", part) == columns(TRAIN, ending)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_folder_has_the_splits_that_its_files_are_named_by(ending, tmp_path):
    write(tmp_path / f"train{ending}", TRAIN)
    write(tmp_path / f"validation{ending}", VALIDATION)
    (tmp_path / "README.md").write_text("# what this is\n", "utf-8")
    assert read_local(tmp_path, "train") == columns(TRAIN, ending)
    assert read_local(tmp_path, "validation") == columns(VALIDATION, ending)
    with one_line("data.name", f'="{tmp_path}" cannot be read as a folder', "with a split test"):
        read_local(tmp_path, "test")


def test_only_the_wanted_columns_are_read(tmp_path):
    write(tmp_path / "rows.parquet", [row | {"secret": 1} for row in TRAIN])
    assert set(read_local(tmp_path / "rows.parquet")) == {"text", "label"}


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", TRAIN)
    assert read_local(Path("~/rows.jsonl")) == columns(TRAIN)


def test_what_is_a_path_and_what_a_name_on_the_hub():
    assert all(map(is_local, ("/a/b", "~/a", "./a", "../a.csv")))
    assert not any(map(is_local, ("a/b", "glue", DEMO)))


def test_the_demo_is_the_file_of_the_package():
    text = (ROOT / "lalora_app/assets/sms_spam.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert read("data.name", DEMO, "none", "train", WANTED) == columns(rows)


def test_no_copy_of_local_data_stays_behind(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "data").mkdir()
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"))
    write(tmp_path / "data" / "train.csv", TRAIN)
    for path in (tmp_path / "data", tmp_path / "data" / "train.csv"):
        assert read_local(path) == columns(TRAIN, ".csv")
    left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"train.csv"}


# --- images -----------------------------------------------------------------------------------


IMAGE = {"image": "data.input-column", "label": "data.label-column"}
CLASSES = {"cat": 0, "dog": 1, "eel": 2}  # labels follow the alphabet


@pytest.fixture
def image_folder(tmp_path):
    """PNGs by class, of two sizes, and the bytes of each with its label."""
    rng = np.random.default_rng(0)
    expected = {}
    for name in ("dog", "eel", "cat"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 256, (8, 8 + i, 3)).astype(np.uint8)
            path = tmp_path / name / f"{i}.png"
            Pictures.fromarray(pixels).save(path)
            expected[path.read_bytes()] = CLASSES[name]
    return tmp_path, expected


def test_an_image_folder_has_the_bytes_of_its_files_and_a_label_a_class(image_folder):
    folder, expected = image_folder
    data = described(folder, input_column="image", num_labels=3, test_fraction=0.3)
    train, test = split(with_classes(data))
    found = [*zip(train.contents, train.labels, strict=True)]
    found += zip(test.contents, test.labels, strict=True)
    assert dict(found) == expected
    assert len(found) == 9


def test_images_in_parquet_keep_their_bytes(image_folder, tmp_path):
    from datasets import Dataset, Features, Image, Value

    _, expected = image_folder
    rows = [{"image": {"bytes": b, "path": None}, "label": label} for b, label in expected.items()]
    kinds = Features({"image": Image(), "label": Value("int64")})
    path = tmp_path / "images.parquet"
    Dataset.from_list(rows, features=kinds).to_parquet(path)
    found = read_local(path, wanted=IMAGE)
    assert [image["bytes"] for image in found["image"]] == list(expected)
    assert found["label"] == list(expected.values())


@pytest.mark.parametrize("image", [None, {"bytes": b"", "path": ""}, {"bytes": b"", "path": "x"}])
def test_a_missing_image_is_one_line(image, tmp_path):
    from datasets import Dataset, Features, Image, Value

    buffer = io.BytesIO()
    Pictures.new("RGB", (4, 4)).save(buffer, "PNG")
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}, "label": 0}]
    rows.append({"image": image, "label": 0})
    kinds = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_list(rows, features=kinds).to_parquet(tmp_path / "images.parquet")
    with one_line("data.input-column", '="image": row 1 has no', "image"):
        split(described(tmp_path / "images.parquet", input_column="image"))


ODD = {
    "is a struct with en, fr, and must be a text": {"en": "hello", "fr": "bonjour"},
    "is a struct with bytes, and must": {"bytes": "hello"},
    "is a struct with bytes, and": {"bytes": 7},
    "has no image: 'hel\\x00lo' cannot be read": {"path": "hel\0lo"},
    "is of type list, and must be a text": ["hello"],
    "holds the number 2.5, and must be a text": 2.5,
    "holds the boolean True, and must be a text": True,
    "is of type datetime, and must be a text": "2026-01-02T03:04:05",  # as the reader takes it
}


@pytest.mark.parametrize("words", list(ODD))
def test_a_value_that_is_no_text_and_no_image_is_described(words, tmp_path):
    path = written(tmp_path / "odd.jsonl", [{"text": ODD[words], "label": 0}])
    with one_line("data.input-column", f'="text": row 0 {words}'):
        split(described(path))


@pytest.mark.parametrize(
    ("name", "part", "size", "wanted"),
    [
        ("rte", "validation", 277, ("sentence1", "sentence2", "label")),
        ("amazon_domains", "train", 6800, ("text", "label", "domain")),
        ("sst2", "validation", 872, ("sentence", "label")),
        ("cifar100", "test", 2500, ("img", "fine_label")),
    ],
)
def test_public_data_sets_are_read_whole(name, part, size, wanted):
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"needs the data set of {folder}")
    found = read_local(folder, part, dict.fromkeys(wanted, "data.input-column"))
    assert {len(column) for column in found.values()} == {size}
    assert set(found) == set(wanted)


# --- the hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub: what was asked of it, and what it does."""
    asked = []

    def answer(with_):
        def load(*args, **kwargs):
            asked.append((args, kwargs))
            if isinstance(with_, Exception):
                raise with_
            return with_

        monkeypatch.setattr("datasets.load_dataset", load)
        return asked

    return answer


def test_a_hub_id_is_asked_for_by_name_subset_and_split(hub):
    from datasets import Dataset

    asked = hub(Dataset.from_list(TRAIN))
    assert read("data.name", "nyu-mll/glue", "sst2", "validation", WANTED) == columns(TRAIN)
    assert read("data.name", "nyu-mll/glue", "none", "train", WANTED) == columns(TRAIN)
    assert asked == [
        (("nyu-mll/glue", "sst2"), {"split": "validation"}),
        (("nyu-mll/glue", None), {"split": "train"}),
    ]


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto the hub"), ConnectionError(), ValueError("")]
)
def test_a_hub_that_cannot_be_reached_is_one_line(error, hub):
    hub(error)
    reason = "no route" if error.args == ("no route\nto the hub",) else type(error).__name__
    with one_line("data.name", '="nyu-mll/glue" (split train)', "not in the local cache", reason):
        split(described("nyu-mll/glue"))


# --- errors -----------------------------------------------------------------------------------


def test_a_missing_column_lists_those_there_are(tmp_path):
    write(tmp_path / "rows.csv", TRAIN)
    wanted = {"body": "data.input-column"}
    with one_line("data.input-column", '="body" must be a column of the data: text, label'):
        read_local(tmp_path / "rows.csv", wanted=wanted)
    with one_line("data.label-column", '="y" must be a column of the data: text, label'):
        read("data.name", DEMO, "none", "train", {"y": "data.label-column"})


def test_an_image_folder_lists_its_columns_too(image_folder):
    with one_line("data.input-column", '="text" must be a column of the data: image, label'):
        split(described(image_folder[0]))


@pytest.mark.parametrize("name", ["file.csv", "folder/file.jsonl.gz"])
def test_17_a_relative_file_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(sources, "_load_hub", lambda *args: pytest.fail("asked the hub"))
    with one_line("data.name", f'="{name}" must be an absolute path, or one that starts with ~'):
        read("data.name", name, "none", "train", WANTED)


@pytest.mark.parametrize(
    "name", ["no/such.csv", "no-such-folder", "rows.doc", "rows", "a.parquet.gz"]
)
def test_what_is_no_data_is_one_line(name, tmp_path):
    (tmp_path / "rows.doc").write_text("x", "utf-8")
    (tmp_path / "rows").write_text("x", "utf-8")
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    endings = "must be an existing folder, or a file ending in one of .jsonl, .json, .parquet, "
    endings += ".csv, .tsv, .txt (all but .parquet also with .gz)"
    with one_line("data.name", f'="{tmp_path / name}" {endings}'):
        read_local(tmp_path / name)


@pytest.mark.parametrize("content", ["", "{ no json\n", '{"text": "a", "label": 0}\n[1]\n'])
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_damaged_file_is_one_line(content, ending, tmp_path):
    path = tmp_path / f"damaged{ending}"
    path.write_text(content, "utf-8")
    with one_line("data.name", f'="{path}"'):
        read_local(path)


def test_a_damaged_file_of_a_client_is_named_by_its_own_key(tmp_path):
    (tmp_path / "own.parquet").write_bytes(b"PAR1 and nothing else")
    with one_line("data-path", "own.parquet"):
        read_local(tmp_path / "own.parquet", key="data-path")


def test_data_without_rows_is_one_line(tmp_path, hub):
    from datasets import Dataset

    empty = Dataset.from_dict({"text": [], "label": []})
    empty.to_parquet(tmp_path / "empty.parquet")
    with one_line("data.name", f'="{tmp_path / "empty.parquet"}"'):
        read_local(tmp_path / "empty.parquet")
    hub(empty)
    with one_line("data.name", '="some/set" must hold at least one example'):
        read("data.name", "some/set", "none", "train", WANTED)


def test_a_folder_without_data_is_one_line(tmp_path):
    with one_line("data.name", f'="{tmp_path}" cannot be read as a folder'):
        read_local(tmp_path)


def test_an_error_without_a_word_is_named_by_its_kind():
    assert errors.first_line(ValueError("one\ntwo")) == "one"
    assert errors.first_line(ValueError(" \n two")) == "two"
    assert errors.first_line(KeyError()) == "KeyError"


# --- what a refusal may tell ------------------------------------------------------------------

MODULES = ("sources", "contents", "examples", "labels", "partition", "encoding", "images")
KEY = re.compile(r"data|data-path|(data|train|privacy|model)\.[a-z-]+")


def constants(module: str) -> set[str]:
    """The strings of a module that look like a key."""
    tree = ast.parse((ROOT / "lalora_app" / "data" / f"{module}.py").read_text("utf-8"))
    found = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    return {text for text in found if isinstance(text, str) and KEY.fullmatch(text)}


def raised_with(module: str) -> list[ast.expr]:
    """The first argument of every DataError of a module."""
    tree = ast.parse((ROOT / "lalora_app" / "data" / f"{module}.py").read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Name)]
    return [call.args[0] for call in named if call.func.id == "DataError"]


@pytest.mark.parametrize("module", MODULES)
def test_every_key_of_a_data_error_has_its_sentence(module):
    assert raised_with(module)
    assert constants(module) <= set(REFUSALS)
    for key in raised_with(module):
        if isinstance(key, ast.Constant):
            assert key.value in REFUSALS
        else:  # handed down from one of the constants above
            assert isinstance(key, ast.Name)
            assert key.id in ("key", "asked_by")


def test_all_keys_are_looked_at_and_no_sentence_is_idle():
    keys = set().union(*map(constants, MODULES))
    elsewhere = {"budget", "busy", "policy", "config", "stage", "update", "held", "rows", "peers"}
    elsewhere |= {"model", "request", "internal", "central"}
    assert keys == set(REFUSALS) - elsewhere


def test_a_data_error_is_a_config_error_that_carries_its_key():
    error = DataError("data.name", '="x" is nowhere')
    assert isinstance(error, ConfigError)
    assert (error.key, str(error)) == ("data.name", 'data.name="x" is nowhere')
