"""Delimited text files (.csv, .tsv) and plain lines (.txt) as columns of texts.

A delimited file has no types. Every field is kept as its text, so that `null` or `NA` stay texts;
only an empty field is a missing value.
"""

import codecs
import csv
import gzip
import io
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lalora_app.settings.names import AUTO

SUFFIXES = (".csv", ".tsv", ".txt")  # each also with .gz
TEXT = "text"  # the only column of a file of plain lines
_CANDIDATES = ",;\t|"
_MARKS = {  # of an encoding, at the start of a file
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
TextColumns = dict[str, list[str | None]]

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts above 128 KiB


@dataclass(frozen=True)
class TextFormat:
    """How a text file is read.

    Attributes:
        encoding: name of a codec; "auto": by the file's byte order mark, else UTF-8.
        separator: one character, or "tab"; "auto": a tab in a .tsv, no separator in a .txt, else
            the candidate that separates the wanted columns.
        wanted: names of the columns that the header must have.
    """

    encoding: str = AUTO
    separator: str = AUTO
    wanted: tuple[str, ...] = ()

    def require_unused(self) -> None:
        """Refuse an encoding or a separator for data that is no delimited text.

        Raises:
            ValueError: if one is named.
        """
        for key, value in {"encoding": self.encoding, "separator": self.separator}.items():
            if value != AUTO:
                raise ValueError(
                    f'data.{key}="{value}" must be "auto" for data other than {", ".join(SUFFIXES)}'
                )


def kind_of(path: Path) -> str:
    """Return the suffix of a file without a final .gz, in small letters."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _decoded(raw: bytes, encoding: str) -> str:
    marked = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    chosen = marked if encoding == AUTO else encoding
    try:
        text = raw.decode(chosen)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"byte {raw[error.start]:#04x} at position {error.start}, on line {line}, is not "
            f'{chosen}: name the encoding of the file, such as data.encoding="cp1252"'
        ) from None
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError(f"it holds zero bytes as {chosen}: name its encoding in data.encoding")
    return text


def _header(text: str, separator: str) -> list[str]:
    # Not strict: a wrong separator may stand beside a quote.
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    return [name.strip() for name in next(filter(None, rows), [])]


def _separator(text: str, form: TextFormat, kind: str) -> str:
    """Return the separator of a table."""
    if form.separator != AUTO:
        return "\t" if form.separator == "tab" else form.separator
    if kind == ".tsv":
        return "\t"
    headers = {candidate: _header(text, candidate) for candidate in _CANDIDATES}
    for candidate, names in headers.items():
        if set(form.wanted) <= set(names):
            return candidate
    # The error of sources.read() lists the columns that this one finds.
    return max(headers, key=lambda candidate: len(headers[candidate]))


def _rows(text: str, separator: str) -> list[list[str]]:
    """Return the header and the rows, without empty lines.

    Raises:
        ValueError: naming the first line of a row whose number of fields differs from the
            header's. An unclosed quote is on this line too.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    numbered, first = [], 1
    try:
        for row in reader:
            numbered += [(first, row)] if row else []
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {first}: {error}") from None
    fields = len(numbered[0][1]) if numbered else 0
    for line, row in numbered:
        if len(row) != fields:
            used = "tab" if separator == "\t" else separator
            raise ValueError(
                f"line {line} has {len(row)} fields and the header has {fields}, with "
                f'data.separator="{used}"'
            )
    return [row for _, row in numbered]


def parse(raw: bytes, kind: str, form: TextFormat) -> TextColumns:
    """Return the columns of one file.

    Args:
        raw: content of the file, not compressed.
        kind: ".csv", ".tsv" or ".txt".
        form: how it is read.

    Raises:
        ValueError: with the reason and its place, if the content cannot be read.
    """
    text = _decoded(raw, form.encoding)
    if kind == ".txt" and form.separator == AUTO:
        # Not splitlines(), which also cuts texts at form feeds and at U+2028.
        lines = io.StringIO(text, newline=None).read().split("\n")
        return {TEXT: [line for line in lines if line.strip()]}
    header, *rows = _rows(text, _separator(text, form, kind)) or [[]]
    # Spreadsheets write empty columns without a name; no key can ask for one.
    named = {i: name for i, field in enumerate(header) if (name := field.strip())}
    if len(named) > len(set(named.values())):
        twice = next(name for name, number in Counter(named.values()).items() if number > 1)
        raise ValueError(f"the header names the column {twice!r} twice")
    return {name: [row[i] or None for row in rows] for i, name in named.items()}


def _columns_of(path: Path, form: TextFormat) -> TextColumns:
    raw = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        raw = gzip.decompress(raw)
    return parse(raw, kind_of(path), form)


def read_files(files: Sequence[Path], form: TextFormat) -> TextColumns:
    """Return the columns of several files with equal headers, one after the other.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a content cannot be read, or the headers differ; of several files, the file
            is named.
    """
    columns: TextColumns = {}
    for path in files:
        try:
            found = _columns_of(path, form)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}" if len(files) > 1 else str(error)) from None
        columns = columns or {name: [] for name in found}
        if columns.keys() != found.keys():
            raise ValueError(f"{path.name} has the columns {list(found)}, not {list(columns)}")
        for name, values in columns.items():
            values += found[name]
    return columns
