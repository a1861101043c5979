"""Factors that wait on the client's disk: used while their version is current, else ignored."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from lalora_app.site_files import resident_factors
from lalora_app.site_files.resident_factors import resident_file

A_NAME, B_NAME, HEAD = "q.lora_A.weight", "q.lora_B.weight", "classifier.weight"


def adapter(value: float) -> dict[str, np.ndarray]:
    shapes = {A_NAME: (2, 6), B_NAME: (4, 2), HEAD: (3, 4)}
    return {name: np.full(shape, value, dtype=np.float32) for name, shape in shapes.items()}


def keep(path, kept, factors, versions, attempt=1):
    resident_factors.save_residents(path, kept, factors, versions, attempt)


def substitute(path, start, versions, attempt=2):
    return resident_factors.with_residents(path, start, versions, attempt)


@pytest.fixture
def path(tmp_path):
    return resident_file(tmp_path, "data", "run")


def values(found) -> dict[str, float]:
    return {name: float(array.flat[0]) for name, array in found.items()}


def test_a_missing_file_means_the_servers_copy(path):
    start = adapter(0)
    found = substitute(path, start, {"A": 0, "B": 0})
    assert values(found) == values(start)
    assert found is not start


def test_only_the_resident_factor_comes_back_and_only_at_its_own_version(path):
    keep(path, adapter(1), frozenset("A"), {"A": 2, "B": 5})
    assert values(substitute(path, adapter(0), {"A": 2, "B": 6})) == {A_NAME: 1, B_NAME: 0, HEAD: 0}
    assert values(substitute(path, adapter(0), {"A": 3, "B": 5})) == {A_NAME: 0, B_NAME: 0, HEAD: 0}


def test_each_factor_is_judged_by_its_own_version(path):
    keep(path, adapter(1), frozenset("AB"), {"A": 2, "B": 5})
    assert values(substitute(path, adapter(0), {"A": 9, "B": 5})) == {A_NAME: 0, B_NAME: 1, HEAD: 0}


def test_the_later_round_replaces_the_earlier_one_and_leaves_no_other_file(path):
    keep(path, adapter(1), frozenset("A"), {"A": 0, "B": 0})
    keep(path, adapter(2), frozenset("B"), {"A": 0, "B": 0})
    assert values(substitute(path, adapter(0), {"A": 0, "B": 0})) == {A_NAME: 0, B_NAME: 2, HEAD: 0}
    assert list(path.parent.iterdir()) == [path]


def test_keeping_nothing_removes_the_file_and_may_be_repeated(path):
    keep(path, adapter(1), frozenset("A"), {"A": 0, "B": 0})
    assert path.exists()
    keep(path, adapter(1), frozenset(), {"A": 0, "B": 0})
    keep(path, adapter(1), frozenset(), {"A": 0, "B": 0})
    assert not path.exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:3], lambda b: b"", bytes.upper])
def test_a_damaged_file_means_the_servers_copy(path, damage):
    keep(path, adapter(1), frozenset("A"), {"A": 0, "B": 0})
    path.write_bytes(damage(path.read_bytes()))
    assert values(substitute(path, adapter(0), {"A": 0, "B": 0})) == values(adapter(0))


def test_a_file_without_versions_means_the_servers_copy(path):
    path.parent.mkdir(parents=True)
    save_file({A_NAME: adapter(1)[A_NAME]}, path)
    assert values(substitute(path, adapter(0), {"A": 0, "B": 0})) == values(adapter(0))


def test_a_tensor_of_another_shape_or_name_is_ignored(path):
    other = {A_NAME: np.ones((3, 6), np.float32), "k.lora_A.weight": np.ones((2, 6), np.float32)}
    keep(path, other, frozenset("A"), {"A": 0, "B": 0})
    found = substitute(path, adapter(0), {"A": 0, "B": 0})
    assert values(found) == values(adapter(0))
    assert found[A_NAME].shape == (2, 6)


def test_every_dataset_and_run_has_its_own_file(tmp_path):
    pairs = [("data", "run"), ("data", "run2"), ("data2", "run"), ("/a/../b", "run")]
    files = {resident_file(tmp_path, *pair) for pair in pairs}
    assert len(files) == len(pairs)
    assert {file.parent for file in files} == {tmp_path / "resident"}


def test_the_starting_adapter_is_not_written_to(path):
    keep(path, adapter(1), frozenset("A"), {"A": 0, "B": 0})
    start = adapter(0)
    substitute(path, start, {"A": 0, "B": 0})
    assert values(start) == values(adapter(0))


def test_a_repeated_attempt_starts_where_its_first_try_did(path):
    versions = {"A": 0, "B": 0}
    keep(path, adapter(1), frozenset("A"), versions, attempt=1)
    keep(path, adapter(2), frozenset("A"), versions, attempt=2)
    assert values(substitute(path, adapter(0), versions, attempt=2))[A_NAME] == 1
    keep(path, adapter(3), frozenset("A"), versions, attempt=2)  # the repetition
    assert values(substitute(path, adapter(0), versions, attempt=2))[A_NAME] == 1
    assert values(substitute(path, adapter(0), versions, attempt=3))[A_NAME] == 3
    keep(path, adapter(4), frozenset(), versions, attempt=3)
    assert values(substitute(path, adapter(0), versions, attempt=4))[A_NAME] == 0
