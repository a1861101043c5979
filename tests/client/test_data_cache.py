"""Encoded examples on disk: what is read is what was encoded, and a change of anything is seen."""

import io
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import make_config
from helpers.app_runs import open_run
from helpers.fake_grid import FakeGrid
from lalora_app.client import data_cache, requests
from lalora_app.client.data_cache import CacheFile
from lalora_app.client.site import Site, admit, fingerprint
from lalora_app.data.encoding import EncodedSequences, EncodedTexts
from lalora_app.data.examples import Examples
from lalora_app.data.images import encode_images
from lalora_app.settings.errors import ConfigError, DataError

TOKENS = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1)


def same(one, other, size=3):
    assert type(one) is type(other)
    assert len(one) == len(other)
    for rows in (range(len(one)), [0], [len(one) - 1] * size):
        a, b = one.batch(list(rows)), other.batch(list(rows))
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels)
        assert (a.mask is None) == (b.mask is None)
        assert a.mask is None or torch.equal(a.mask, b.mask)


@settings(deadline=None)  # it syncs files
@given(TOKENS, st.integers(0, 9), st.integers(1, 9))
def test_texts_come_back(tmp_path_factory, tokens, pad, shortest):
    rows = tuple(map(tuple, tokens))
    file = CacheFile(tmp_path_factory.mktemp("cache") / "x.safetensors", "f")
    labels = tuple(range(len(rows)))
    texts = EncodedTexts(rows, labels, pad, 9, shortest)
    for encoded in (texts, EncodedSequences(rows, 10, shortest)):
        file.write(encoded)
        assert file.read() == encoded
        same(file.read(), encoded)


def test_images_come_back(tmp_path):
    def image(shade, side):
        file = io.BytesIO()
        Image.new("RGB", (side, side), (shade, 0, 255)).save(file, "png")
        return file.getvalue()

    encoded = encode_images(Examples((image(3, 4), image(200, 2), image(9, 4)), (1, 0, 1)), 4, 4)
    file = CacheFile(tmp_path / "x.safetensors", "f")
    file.write(encoded)
    found = file.read()
    assert (found.labels, found.places) == (encoded.labels, encoded.places)
    assert len(found.stacks) == 2
    for one, other in zip(found.stacks, encoded.stacks, strict=True):
        assert torch.equal(one, other)


def test_the_file_is_this_users_alone(tmp_path):
    file = CacheFile(tmp_path / "new" / "x.safetensors", "f")
    file.write(EncodedSequences(((1, 2),)))
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.path.parent.stat().st_mode & 0o777 == 0o700
    assert list(file.path.parent.iterdir()) == [file.path]


@pytest.mark.parametrize("harm", ["missing", "damaged", "cut", "another"])
def test_what_does_not_fit_is_not_read(tmp_path, harm):
    file = CacheFile(tmp_path / "x.safetensors", "f")
    if harm != "missing":
        file.write(EncodedSequences(((1, 2), (3,))))
    if harm == "damaged":
        file.path.write_bytes(b"\xff" * 64)
    if harm == "cut":
        file.path.write_bytes(file.path.read_bytes()[:-4])
    wanted = CacheFile(file.path, "g") if harm == "another" else file
    assert wanted.read() is None


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.jsonl"
    words = ("free prize", "see you later", "call now")
    rows = [{"text": words[i % 3], "label": i % 2} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


def test_a_change_of_data_or_keys_is_another_fingerprint(data_file):
    def seen(**changes):
        return fingerprint(make_config(**changes), str(data_file))

    plain = seen()
    assert seen(**{"train.batch-size": 7, "seed": 5, "model.device": "cpu"}) == plain
    lengths = ({"model.max-length": 9}, {"model.min-length": 9})
    changes = (*lengths, {"data.label-column": "other"}, {"data.num-labels": 3})
    assert len({plain, *(seen(**change) for change in changes)}) == 5
    before = data_file.stat()
    os.utime(data_file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert seen() != plain


def test_another_file_format_in_the_node_config_is_another_fingerprint(tiny, data_file, tmp_path):
    node = {"data-path": str(data_file), "max-epsilon": float("inf"), "data-cache": str(tmp_path)}

    def seen(run=None, **said):
        config = tiny(**open_run() | (run or {}))
        return data_cache.cache_file(admit(config, node | said, 1), config).fingerprint

    changes = ({"encoding": "cp1252"}, {"separator": ";"}, {"white-level": 4095})
    assert len({seen(), *(seen(**change) for change in changes)}) == 4
    # The run's own keys decide on nothing at a site.
    assert seen({"data.encoding": "cp1252", "data.white-level": 255.0}) == seen()


def test_a_file_with_other_content_and_the_old_time_is_another_fingerprint(data_file):
    config, before = make_config(), data_file.stat()
    plain = fingerprint(config, str(data_file))
    data_file.write_text(data_file.read_text("utf-8").replace("free", "dear"), "utf-8")
    os.utime(data_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = data_file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert fingerprint(config, str(data_file)) != plain


def counted(monkeypatch):
    """Count how often data is read."""
    reads, honest = [], Site.examples

    def examples(self, config):
        reads.append(self.client)
        return honest(self, config)

    monkeypatch.setattr(Site, "examples", examples)
    return reads


def test_a_node_reads_its_data_once_while_nothing_changes(tiny, tmp_path, data_file, monkeypatch):
    reads = counted(monkeypatch)
    config = tiny(**open_run() | {"min-clients": 1, "min-replies": 1, "data.num-labels": 2})
    node = {"data-path": str(data_file), "max-epsilon": float("inf"), "name": "a"}
    plain, cached = ({**node}, {**node, "data-cache": str(tmp_path / "cache")})
    results = []
    for extra in (plain, cached):
        grid = FakeGrid(config, [extra])
        context = next(iter(grid.contexts.values()))
        site = admit(config, context.node_config, 1)
        results.append([requests._load(config, site)[2] for _ in range(3)])
    assert len(reads) == 3 + 1
    for encoded in results[1]:
        same(encoded, results[0][0])


def test_too_few_examples_are_refused_from_the_cache_too(tiny, tmp_path, data_file):
    node = {"data-path": str(data_file), "max-epsilon": float("inf"), "data-cache": str(tmp_path)}
    changes = open_run() | {"data.num-labels": 2}
    config = tiny(**changes)
    requests._load(config, admit(config, node, 1))
    greedy = tiny(**changes | {"train.batch-size": 61})
    with pytest.raises(ConfigError, match="batch-size=61"):
        requests._load(greedy, admit(greedy, node, 1))


def test_a_cache_needs_data_of_its_own(tiny, tmp_path):
    node = {"partition-id": 0, "num-partitions": 2, "data-cache": str(tmp_path)}
    with pytest.raises(ConfigError, match="data-cache needs data-path"):
        admit(tiny(**open_run()), node, 1)


def test_no_file_without_a_folder(tiny, data_file):
    node = {"data-path": str(data_file), "max-epsilon": float("inf")}
    config = tiny(**open_run())
    assert data_cache.cache_file(admit(config, node, 1), config) is None


def test_missing_data_is_named_as_without_a_cache(tiny, tmp_path):
    node = {"data-path": str(tmp_path / "no.jsonl"), "max-epsilon": float("inf")}
    node |= {"data-cache": str(tmp_path / "cache")}
    config = tiny(**open_run())
    with pytest.raises(DataError) as error:
        requests._load(config, admit(config, node, 1))
    assert error.value.key == "data-path"
