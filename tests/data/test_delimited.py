"""Delimited text files: separators, encodings, missing values, and what is refused."""

import csv
import gzip
import io
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import described, make_config
from lalora_app.data.delimited import TextFormat, kind_of, parse
from lalora_app.data.examples import split, with_classes
from lalora_app.settings.errors import DataError

WANTED = ("text", "label")
ROWS = [[f"the dish number {i} was good", str(i % 2)] for i in range(40)]


def content(rows, separator=",", header=WANTED):
    file = io.StringIO()
    csv.writer(file, delimiter=separator).writerows([header, *rows])
    return file.getvalue()


def examples(path, **changes):
    """All examples of a file, by text."""
    train, test = split(with_classes(described(path, **{"num_labels": 0} | changes)))
    found = dict(zip(train.contents, train.labels, strict=True))
    return found | dict(zip(test.contents, test.labels, strict=True))


EXPECTED = {text: int(label) for text, label in ROWS}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "separator", "changes"),
    [
        ("x.csv", ",", {}),
        ("x.csv", ";", {}),
        ("x.csv", "\t", {}),
        ("x.csv", "|", {}),
        ("x.CSV", ",", {}),
        ("x.tsv", "\t", {}),
        ("x.csv", "~", {"separator": "~"}),
        ("x.txt", "\t", {"separator": "tab"}),
        ("x.txt", ";", {"separator": ";"}),
    ],
)
def test_every_separator_is_found_or_named(name, separator, changes, packed, tmp_path):
    raw = content(ROWS, separator).encode()
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert examples(path, **changes) == EXPECTED


def test_a_folder_of_files_means_the_same_as_one_file(tmp_path):
    (tmp_path / "train-0.csv").write_text(content(ROWS[:20], ";"), "utf-8")
    (tmp_path / "train-1.csv").write_text(content(ROWS[20:], ";"), "utf-8")
    assert examples(tmp_path) == EXPECTED


def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path):
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]" / "train.csv").write_text(content(ROWS), "utf-8")
    with pytest.raises(DataError, match=r'a\[1\]" must be a path without \* \? \[ for a folder$'):
        examples(tmp_path / "a[1]")
    assert examples(tmp_path / "a[1]" / "train.csv") == EXPECTED  # of a file it is no pattern


@pytest.mark.parametrize("packed", ["train.csv.bz2", "train.csv.xz", "train.zip"])
def test_other_archives_of_text_files_are_refused_by_name(packed, tmp_path):
    """The reader of datasets would take them, with NA for a missing text."""
    import bz2
    import lzma
    import zipfile

    path, raw = tmp_path / packed, content([["NA", "0"], *ROWS]).encode()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("train.csv", raw)
    else:
        path.write_bytes({".bz2": bz2, ".xz": lzma}[path.suffix].compress(raw))
    words = rf": {packed} must end in \.csv, \.tsv, \.txt, or one of them with \.gz$"
    with pytest.raises(DataError, match=words):
        examples(tmp_path)


def test_a_damaged_gz_file_is_told_by_its_kind(tmp_path):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(content(ROWS).encode())[:-15])
    with pytest.raises(DataError, match=r" cannot be read as \.csv: Compressed file ended"):
        examples(path)


@pytest.mark.parametrize(("separator", "named"), [(",", ","), ("\t", "tab"), ("|", "|")])
def test_an_uneven_row_is_told_with_the_separator_as_the_key_takes_it(separator, named, tmp_path):
    raw = content([*ROWS, ["a", "1", "more"]], separator).encode()
    with pytest.raises(ValueError, match=r"^line 42 ") as caught:
        parse(raw, ".csv", TextFormat(wanted=WANTED))
    assert str(caught.value).endswith(f'the header has 2, with data.separator="{named}"')
    make_config(**{"data.separator": named})  # the key takes it


def test_an_unknown_separator_is_seen_in_the_column_s_name(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(content(ROWS, "~"), "utf-8")
    with pytest.raises(DataError, match=r'="text" must be a column of the data: text~label$'):
        examples(path)


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with a mark", "cp1252", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_marks_are_seen_and_other_encodings_are_named(encoding, tmp_path):
    rows = [[f"caf\u00e9 number {i}", str(i % 2)] for i in range(40)]
    text, marked = content(rows), "mark" in encoding
    raw = b"\xff\xfe" + text.encode("utf-16-le") if marked else text.encode(encoding)
    path = tmp_path / "x.csv"
    path.write_bytes(raw)
    changes = {"encoding": "cp1252"} if encoding == "cp1252" else {}
    assert examples(path, **changes) == {text: int(label) for text, label in rows}


def test_04_another_encoding_is_refused_with_its_place_and_what_helps(tmp_path):
    raw = content([["plain", "0"], ["caf\u00e9", "1"]]).encode("latin-1")
    path = tmp_path / "x.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        examples(path)
    assert str(caught.value) == (
        f'data.name="{path}" cannot be read as .csv: byte 0xe9 at position {raw.index(0xE9)}, on '
        'line 3, is not utf-8: name the encoding of the file, such as data.encoding="cp1252"'
    )


def test_two_byte_text_without_a_mark_is_refused():
    raw = content(ROWS).encode("utf-16-le")
    with pytest.raises(ValueError, match="zero bytes"):
        parse(raw, ".csv", TextFormat())
    assert parse(raw, ".csv", TextFormat(encoding="utf-16-le"))["text"][0] == ROWS[0][0]


def test_05_a_column_of_numbers_holds_no_texts(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(content([[str(1000 + i), str(i % 2)] for i in range(40)]), "utf-8")
    with pytest.raises(DataError, match=r'="text": row 0 holds the number 1000 and no text$'):
        examples(path)
    with path.open("a") as file:
        file.write("one thousand,0\n")
    assert examples(path)["1000"] == 0  # one text, so the others are texts too


def test_texts_that_other_readers_take_for_missing_stay_texts():
    words = ["null", "NA", "None", "nan", "N/A", "#N/A", "-", "true", "1e5"]
    rows = [[word, str(i % 2)] for i, word in enumerate(words)]
    assert parse(content(rows).encode(), ".csv", TextFormat())["text"] == words


def test_only_an_empty_field_is_missing():
    found = parse(b'text,label\n,1\n  ,2\n"",3\n', ".csv", TextFormat())
    assert found == {"text": [None, "  ", None], "label": ["1", "2", "3"]}


REFUSED = {
    "too many fields": (b"text,label\na,1\nb,2,3\n", r"line 3 has 3 fields and the header has 2"),
    "too few fields": (b"text,label\na\n", r"line 2 has 1 fields and the header has 2"),
    "an open quote": (b'text,label\n"a,1\n', r"line 2: unexpected end of data"),
    "text after a quote": (b'text,label\n"a"b,1\n', r"line 2: ',' expected after '\"'"),
    "a stray quote": (
        b'text,label\na,1\n"b,0\n' + b"c,1\n" * 50,
        r"^line 3: unexpected end of data",
    ),
    "a column twice": (b"text,text\na,1\n", r"the header names the column 'text' twice"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_malformed_is_told_with_its_line(case):
    raw, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        parse(raw, ".csv", TextFormat(wanted=("text",)))


def test_of_several_files_the_bad_one_is_named(tmp_path):
    (tmp_path / "train-0.csv").write_text(content(ROWS), "utf-8")
    (tmp_path / "train-1.csv").write_bytes(content([["caf\u00e9", "1"]]).encode("latin-1"))
    with pytest.raises(DataError, match=r"train-1\.csv: byte 0xe9 at position"):
        examples(tmp_path)


def test_empty_lines_above_the_header_are_no_header():
    raw = b"\r\n\r\ntext;label\r\na;1\r\n"
    assert parse(raw, ".csv", TextFormat(wanted=WANTED)) == {"text": ["a"], "label": ["1"]}


def test_columns_without_a_name_are_no_columns():
    raw = b",text,label,,\n0,a,1,,\n1,b,0,x,\n"
    assert parse(raw, ".csv", TextFormat(wanted=WANTED)) == {
        "text": ["a", "b"],
        "label": ["1", "0"],
    }


def test_a_line_ends_only_at_line_ends():
    raw = "a\u2028b\r\nc\x85d\re\x0cf\n".encode()
    assert parse(raw, ".txt", TextFormat()) == {"text": ["a\u2028b", "c\x85d", "e\x0cf"]}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
@pytest.mark.parametrize("changes", [{"encoding": "cp1252"}, {"separator": "tab"}])
def test_a_text_format_of_other_files_is_refused(name, changes, tmp_path):
    import pandas as pd

    table = pd.DataFrame([(text, int(label)) for text, label in ROWS], columns=list(WANTED))
    path = tmp_path / name
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    assert examples(path) == EXPECTED
    ((key, value),) = changes.items()
    law = rf'data\.{key}="{value}" must be "auto" for data other than \.csv'
    with pytest.raises(DataError, match=law):
        examples(path, **changes)
    with pytest.raises(DataError, match=rf'^data\.name="demo:sms-spam": {law}'):
        examples("demo:sms-spam", **changes)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_is_utf_8_with_or_without_a_mark(suffix, tmp_path):
    rows = [{"text": f"caf\u00e9 {i}", "label": i % 2} for i in range(40)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]"
    for encoding in ("utf-8", "utf-8-sig"):
        path = tmp_path / f"{encoding}{suffix}"
        path.write_bytes(text.encode(encoding))
        assert examples(path) == {row["text"]: row["label"] for row in rows}
    other = tmp_path / f"cp1252{suffix}"
    other.write_bytes(text.encode("cp1252"))
    with pytest.raises(DataError, match=r"^data\.name=.* cannot be read as .*(utf-8|UTF-8)"):
        examples(other)


def test_a_damaged_text_in_a_typed_file_is_one_line(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    damaged = pa.array([b"caf\xe9"] * 40, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": damaged, "label": [0, 1] * 20}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"holds a damaged text: .* byte 0xe9"):
        examples(tmp_path / "x.parquet")


def test_files_with_other_columns_are_refused(tmp_path):
    (tmp_path / "train-0.csv").write_text(content(ROWS), "utf-8")
    (tmp_path / "train-1.csv").write_text(content(ROWS, header=("text", "y")), "utf-8")
    with pytest.raises(DataError, match=r"train-1\.csv has the columns \['text', 'y'\], not"):
        examples(tmp_path)


def test_a_plain_text_file_is_one_text_per_line(tmp_path):
    path = tmp_path / "x.txt"
    lines = [f"one {i}\n\ntwo, {i}\n \n" for i in range(20)]
    path.write_text("".join(lines), "utf-8")
    data = described(path, label_column="none", partitioner="iid", num_labels=0)
    train, test = split(data)
    expected = {text for i in range(20) for text in (f"one {i}", f"two, {i}")}
    assert {*train.contents, *test.contents} == expected
    assert len(train) + len(test) == 40


def test_the_kind_of_a_file_does_not_depend_on_its_compression(tmp_path):
    names = ["a.CSV.gz", "a.tsv", "b"]
    assert [kind_of(tmp_path / name) for name in names] == [".csv", ".tsv", ""]


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1)


@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1),
    st.sampled_from(",;|\t"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@example([("a\nb", ' "quoted", '), ("\ufeff", "x")], ",", "utf-8-sig", csv.QUOTE_MINIMAL)
def test_texts_come_back_as_pandas_wrote_them(rows, separator, encoding, quoting):
    import pandas as pd

    table = pd.DataFrame(rows, columns=list(WANTED))
    text = table.to_csv(index=False, sep=separator, quoting=quoting)
    found = parse(text.encode(encoding), ".csv", TextFormat(wanted=WANTED))
    assert list(zip(found["text"], found["label"], strict=True)) == rows
