"""The division of examples into tasks: complete, disjoint, named by all that it depends on."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import described, make_config, one_line, written
from lalora_app.data.examples import Examples, private_file, split
from lalora_app.data.task_division import division_of, of_task, with_names
from lalora_app.settings.errors import ConfigError

CLASSES = ["a", "b", "c", "d", "e"]


def divided(tasks=2, **changes):
    """The config of a run whose tasks divide the classes a to e."""
    keys = {"data.tasks": tasks, "data.labels": ",".join(CLASSES), "data.num-labels": 5}
    return make_config(**keys | {"num-server-rounds": 6} | changes)


def rows_of(columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    tasks=st.integers(2, 5),
    order=st.sampled_from(["listed", "seeded"]),
    seed=st.integers(0, 2**63 - 1),
    labels=st.lists(st.integers(0, 4), max_size=30),
)
def test_every_example_is_in_one_task_and_tasks_are_of_about_equal_size(tasks, order, seed, labels):
    config = divided(tasks, seed=seed, **{"data.task-order": order})
    examples = Examples(tuple(str(i) for i in range(len(labels))), tuple(labels))
    parts = [of_task(examples, config, task) for task in range(tasks)]
    assert sorted(sum((part.contents for part in parts), ()), key=int) == list(examples.contents)
    groups = [division_of(config).values_of(task) for task in range(tasks)]
    assert sorted(sum(groups, ())) == CLASSES
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    for part, group in zip(parts, groups, strict=True):
        assert {CLASSES[label] for label in part.labels} <= set(group)


def test_listed_classes_keep_their_order_and_the_seed_shuffles_them():
    assert division_of(divided(2)).values_of(0) == ("a", "b", "c")
    assert division_of(divided(2)).values_of(1) == ("d", "e")
    seeded = {"data.task-order": "seeded"}
    orders = {division_of(divided(5, seed=seed, **seeded)).tasks for seed in range(6)}
    assert len(orders) > 1
    one = division_of(divided(5, seed=3, **seeded))
    assert one == division_of(divided(5, seed=3, **seeded))


def test_one_task_has_all_examples():
    examples = Examples(("x", "y"), (0, 1))
    assert of_task(examples, make_config(), 0) is examples


def test_the_name_of_a_division_covers_column_values_their_order_and_tasks():
    changes = {
        "itself": {},
        "another number of tasks": {"data.tasks": 3},
        "another order of the classes": {"data.labels": "b,a,c,d,e"},
        "other classes": {"data.labels": "a,b,c,d,f"},
        "another column": {"data.label-column": "topic"},
    }
    names = {key: division_of(divided(**{"data.tasks": 2} | c)).name for key, c in changes.items()}
    assert len(set(names.values())) == len(changes)
    assert names["itself"] == division_of(divided()).name
    assert division_of(divided()).part(1) == names["itself"] + "/2"


def test_a_column_and_the_classes_never_have_one_name():
    by_class = division_of(divided(**{"data.label-column": "x"}))
    column = {"data.task-column": "x", "data.task-values": ",".join(CLASSES)}
    by_column = division_of(divided(**column))
    assert by_class.values == by_column.values
    assert by_class.tasks == by_column.tasks
    assert by_class.name != by_column.name


def test_too_few_classes_are_refused():
    with pytest.raises(ConfigError, match=r"^data\.tasks=6 must be at most 5, .* classes$"):
        division_of(divided(6))


COLUMNS = {
    "text": [f"text {i}" for i in range(12)],
    "label": [0, 1] * 6,
    "domain": ["toys", "books", "books", "films"] * 3,
}


def test_a_column_divides_the_data(tmp_path):
    data = described(written(tmp_path / "x.jsonl", rows_of(COLUMNS)), tasks=2, task_column="domain")
    named = with_names(data)
    assert named.task_values == "books,films,toys"
    train, test = split(named)
    config = replace(divided(2), data=named)
    for side in (train, test):
        for task, domains in enumerate([{"books", "films"}, {"toys"}]):
            part = of_task(side, config, task)
            numbers = [int(content.split()[1]) for content in part.contents]
            assert {COLUMNS["domain"][i] for i in numbers} <= domains
            assert all(part.labels[k] == i % 2 for k, i in enumerate(numbers))


def test_a_row_without_a_known_value_is_refused(tmp_path):
    rows = rows_of(COLUMNS | {"domain": ["books"] * 11 + ["cars"]})
    data = described(
        written(tmp_path / "x.jsonl", rows),
        tasks=2,
        task_column="domain",
        task_values="books,films",
        labels="0,1",
    )
    with one_line("data.task-values", "row 11", "'cars'", "'books', 'films'"):
        private_file(data.name, data)
    empty = rows_of(COLUMNS | {"domain": ["books"] * 11 + [None]})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in empty), "utf-8")
    with one_line("data.task-values", "row 11", "''"):
        private_file(data.name, data)


def test_a_missing_column_and_too_few_values_are_refused(tmp_path):
    file = written(tmp_path / "x.jsonl", rows_of(COLUMNS | {"domain": ["books"] * 12}))
    with one_line("data.task-column", '="topic" must be a column'):
        with_names(described(file, tasks=2, task_column="topic"))
    with pytest.raises(ConfigError, match=r'^data\.task-values="auto" must find 2 .* finds \'book'):
        with_names(described(file, tasks=2, task_column="domain"))
