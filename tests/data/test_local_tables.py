"""Local files without a copy on the disk, equal to `load_dataset` in every supported format."""

import csv
import io
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image as Pictures

from conftest import ROOT
from lalora_app.data.sources import read
from lalora_app.settings.errors import DataError

pytestmark = [  # of the CSV reader of datasets
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def write_csv(path: Path, rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4 + seed % 3, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Pictures.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(i))


# --- one builder per case: it writes the data and returns the path of it ------------------------


def csv_with_gaps(folder: Path) -> Path:
    rows = [["text", "label", "score", "flag", "empty"]]
    rows += [["a, with comma", 1, 0.5, "True", ""], ["two\nlines", "", "", "False", ""]]
    rows += [['a "quote"', 3, "nan", "True", ""], ["NA", 4, "1e3", "False", ""]]
    write_csv(folder / "rows.csv", rows)
    return folder / "rows.csv"


def csv_of_whole_labels(folder: Path) -> Path:
    write_csv(folder / "rows.csv", [["text", "label"], ["a", "01"], ["ü", "2"], ["123", "-3"]])
    return folder / "rows.csv"


def csv_with_late_floats(folder: Path) -> Path:
    """The library reads 10,000 rows at a time and takes the types of the first of them."""
    rows = [["text", "label"], *([f"t{i}", i] for i in range(10_000)), ["late", 0.5]]
    write_csv(folder / "rows.csv", rows)
    return folder / "rows.csv"


def csv_with_late_gaps(folder: Path) -> Path:
    rows = [["text", "label"], *([f"t{i}", i] for i in range(10_000)), ["late", ""], ["", 7]]
    write_csv(folder / "rows.csv", rows)
    return folder / "rows.csv"


def csv_with_uneven_rows(folder: Path) -> Path:
    (folder / "rows.csv").write_text("text,label\na,1\nb,2,3,4\n", "utf-8")
    return folder / "rows.csv"


def lines_with_gaps(folder: Path) -> Path:
    rows = [{"text": "a", "label": 1}, {"text": None, "label": None, "extra": [1, 2]}, {"label": 3}]
    write_lines(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


def lines_of_every_kind(folder: Path) -> Path:
    row = {"text": "a", "label": True, "x": 1.5, "deep": {"b": [1, None], "c": {"d": "e"}}}
    dates = {"time": "2026-01-02", "big": 2**53 + 1, "list": ["a", "b"]}
    write_lines(folder / "rows.jsonl", [row | dates, row | dates | {"x": 2, "label": False}])
    return folder / "rows.jsonl"


def lines_of_mixed_types(folder: Path) -> Path:
    write_lines(folder / "rows.jsonl", [{"text": "a", "label": 1}, {"text": 2, "label": "x"}])
    return folder / "rows.jsonl"


def json_list(folder: Path) -> Path:
    rows = [{"text": f"t{i}", "label": i % 3} for i in range(5)]
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), "utf-8")
    return folder / "rows.json"


def json_columns(folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps({"text": ["a", "b"], "label": [0, 1]}), "utf-8")
    return folder / "rows.json"


def json_texts(folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps(["a", "b"]), "utf-8")
    return folder / "rows.json"


def broken_json(folder: Path) -> Path:
    (folder / "rows.json").write_text('{"text": ', "utf-8")
    return folder / "rows.json"


def parquet_of_classes(folder: Path) -> Path:
    from datasets import ClassLabel, Dataset, Features, Value

    kinds = Features({"text": Value("large_string"), "label": ClassLabel(names=["no", "yes"])})
    kinds["half"], kinds["time"] = Value("float16"), Value("timestamp[us]")
    rows = {"text": ["a", None, "c"], "label": [1, None, 0], "half": [0.5, None, 2.0]}
    times = [datetime(2026, 1, 2, 3, 4, 5), None, datetime(1999, 1, 1)]
    Dataset.from_dict(rows | {"time": times}, features=kinds).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def parquet_of_images(folder: Path) -> Path:
    from datasets import Dataset, Features, Image, Value

    images = [{"bytes": png(1), "path": "a.png"}, None, {"bytes": b"", "path": "b.png"}]
    kinds = Features({"image": Image(), "label": Value("int32")})
    table = Dataset.from_dict({"image": images, "label": [0, 1, 2]}, features=kinds)
    table.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def parquet_by_pyarrow(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["a", "b", "c"], "label": pa.array([1, 2, None], pa.int8())})
    pq.write_table(table, folder / "rows.parquet", row_group_size=1)
    return folder / "rows.parquet"


def empty_parquet(folder: Path) -> Path:
    from datasets import Dataset

    Dataset.from_dict({"text": [], "label": []}).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def folder_of_csv(folder: Path) -> Path:
    write_csv(folder / "data" / "train-00000.csv", [["text", "label"], ["a", 1]])
    write_csv(folder / "data" / "train-00001.csv", [["text", "label"], ["b", 2], ["c", ""]])
    write_csv(folder / "data" / "test.csv", [["text", "label"], ["d", 3]])
    return folder


def folder_with_two_kinds(folder: Path) -> Path:
    write_lines(folder / "a.jsonl", [{"text": "a", "label": 1}])
    write_lines(folder / "b.jsonl", [{"text": "b", "label": 2}])
    write_csv(folder / "notes.csv", [["text", "label"], ["not read", 9]])
    return folder


def folder_with_other_columns(folder: Path) -> Path:
    write_lines(folder / "a.jsonl", [{"text": "a", "label": 1}])
    write_lines(folder / "b.jsonl", [{"other": "b"}])
    return folder


def folder_with_a_card(folder: Path) -> Path:
    write_lines(folder / "one.jsonl", [{"text": "a", "label": 1}])
    write_lines(folder / "two.jsonl", [{"text": "b", "label": 2}])
    card = (
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: two.jsonl\n"
    )
    (folder / "README.md").write_text(f"---\n{card}---\n", "utf-8")
    return folder


def packed_folder(folder: Path) -> Path:
    import gzip

    with gzip.open(folder / "train.csv.gz", "wt") as file:
        file.write("text,label\na,1\nb,0\n")
    return folder


def images_by_class(folder: Path) -> Path:
    write_images(folder, ["cat/1.png", "dog/2.png", "cat/3.jpg", "eel/4.png", "dog/5.PNG"])
    (folder / "dog" / "notes.txt").write_text("no image", "utf-8")
    return folder


def images_at_two_depths(folder: Path) -> Path:
    write_images(folder, ["cat/1.png", "dog/deep/2.png"])
    return folder


def images_by_split_and_class(folder: Path) -> Path:
    write_images(folder, ["train/b/1.png", "train/a/2.png", "test/a/3.png", "test/b/4.png"])
    return folder


def images_without_classes(folder: Path) -> Path:
    write_images(folder, ["1.png", "2.png"])
    return folder


def images_with_metadata(folder: Path) -> Path:
    write_images(folder, ["1.png", "2.png"])
    write_csv(folder / "metadata.csv", [["file_name", "label"], ["2.png", 1], ["1.png", 0]])
    return folder


CASES = {
    f.__name__: f
    for f in (
        *(csv_with_gaps, csv_of_whole_labels, csv_with_late_floats, csv_with_late_gaps),
        *(csv_with_uneven_rows, lines_with_gaps, lines_of_every_kind, lines_of_mixed_types),
        *(json_list, json_columns, json_texts, broken_json, parquet_of_classes, parquet_of_images),
        *(parquet_by_pyarrow, empty_parquet, folder_of_csv, folder_with_two_kinds),
        *(folder_with_other_columns, folder_with_a_card, packed_folder, images_by_class),
        *(images_by_split_and_class, images_without_classes, images_with_metadata),
        images_at_two_depths,
    )
}
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def as_texts(path: Path, split: str, cache: Path) -> dict[str, list] | None:
    """All columns of CSV files by `load_dataset`, with the type of texts given."""
    from datasets import Features, Value, load_dataset

    first = path.read_text("utf-8").splitlines()[0] if path.is_file() else "text,label"
    names = first.split(",")
    source = {"path": "csv", "data_files": {split: str(path)}}
    source = source if path.is_file() else {"path": str(path)}
    kinds = {"features": Features({name: Value("string") for name in names})}
    try:
        table = load_dataset(**source, **kinds, split=split, cache_dir=cache, keep_default_na=False)
    except Exception:
        return None
    return {name: [text or None for text in table[name]] for name in names} if len(table) else None


def oracle(path: Path, split: str, cache: Path) -> dict[str, list] | None:
    """All columns by `load_dataset`, images encoded; None: it refuses, or finds no row."""
    from datasets import Image, load_dataset

    source = {"path": str(path)}
    if path.is_file():
        source = {"path": KINDS[path.suffix], "data_files": {split: str(path)}}
    try:
        table = load_dataset(**source, split=split, cache_dir=str(cache))
    except Exception:
        return None
    for name, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
    return {name: list(table[name]) for name in table.column_names} if len(table) else None


def types_of(value):
    if isinstance(value, dict):
        return {key: types_of(item) for key, item in value.items()}
    return [types_of(item) for item in value] if isinstance(value, list) else type(value)


SPLITS = ("train", "test", "train[:1]", "train+test", "all", "no-such")
IS_FOLDER = ("folder", "images_")


@pytest.mark.parametrize(
    ("case", "split"),
    [
        (case, split)
        for case in CASES
        for split in (SPLITS if case.startswith(IS_FOLDER) else ("train",))
    ],
)
def test_every_format_is_read_as_load_dataset_reads_it(case, split, tmp_path):
    (tmp_path / "data").mkdir()
    path = CASES[case](tmp_path / "data")
    delimited = case.startswith("csv") or case in ("folder_of_csv", "packed_folder")
    expected = (as_texts if delimited else oracle)(path, split, str(tmp_path / "cache"))
    if expected is None:
        with pytest.raises(DataError) as caught:
            read("data.name", str(path), "none", split, {"label": "data.label-column"})
        assert "\n" not in str(caught.value)
        return
    wanted = dict.fromkeys(expected, "data.input-column")
    found = read("data.name", str(path), "none", split, wanted)
    assert repr(found) == repr(expected)  # also where a value is NaN
    assert types_of(found) == types_of(expected)


def test_the_cases_are_not_all_refused(tmp_path):
    (tmp_path / "data").mkdir()
    found = as_texts(csv_with_late_gaps(tmp_path / "data"), "train", str(tmp_path / "cache"))
    assert found["label"][-2:] == [None, "7"]
    found = oracle(json_list(tmp_path / "data"), "train", tmp_path / "more")
    assert found["label"] == [0, 1, 2, 0, 1]


def test_a_split_in_several_tables_is_read_in_order(tmp_path, monkeypatch):
    """Above 500 MB the library writes a second table; here above a few bytes."""
    import datasets

    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", "10KB")
    rows = [{"text": f"a text that takes some room {i}" * 5, "label": i} for i in range(2000)]
    for part in range(4):
        write_lines(tmp_path / f"train-{part}.jsonl", rows[500 * part : 500 * (part + 1)])
    found = read("data.name", str(tmp_path), "none", "train", {"label": "data.label-column"})
    assert found["label"] == list(range(2000))


def test_no_table_stays_in_the_memory_file_system(tmp_path):
    memory = fsspec.filesystem("memory")
    before = memory.find("/")
    path = csv_of_whole_labels(tmp_path)
    read("data.name", str(path), "none", "train", {"label": "data.label-column"})
    with pytest.raises(DataError):
        read("data.name", str(broken_json(tmp_path)), "none", "train", {})
    assert memory.find("/") == before


# Python's audit events of everything that makes, opens for writing, or moves a file or folder.
WATCHED = """
import os, sys
from lalora_app.data.sources import read
import datasets, pandas, PIL.Image, pyarrow.parquet

made = []

def watch(event, arguments):
    if event == "open":
        flags = arguments[2] or 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and arguments[0] != os.devnull:
            made.append((event, arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "shutil.move"):
        made.append((event, *arguments))
    elif event.startswith("tempfile."):
        made.append((event, *arguments))

sys.addaudithook(watch)
for path in sys.argv[1:]:
    columns = read("data-path", path, "none", "train", {"label": "data.label-column"})
    assert columns["label"]
print(len(sys.argv) - 1, made)
"""


def test_reading_makes_no_file_and_no_folder(tmp_path):
    cases = ("csv_with_gaps", "lines_with_gaps", "json_list", "json_columns", "parquet_of_classes")
    cases += ("parquet_of_images", "folder_of_csv", "packed_folder", "images_by_class")
    paths = []
    for case in cases:
        (tmp_path / "data" / case).mkdir(parents=True)
        paths.append(str(CASES[case](tmp_path / "data" / case)))
    places = {}
    for name in ("TMPDIR", "HF_HOME", "HOME", "XDG_CACHE_HOME", "here"):
        places[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *paths],
        cwd=places.pop("here"),
        env=os.environ | places | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{len(cases)} []"
    left = [p for name in ("TMPDIR", "here") for p in (tmp_path / name).rglob("*")]
    assert left == []
