"""What a site says of its own data: a server must not choose its columns."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from PIL import Image

from conftest import defaults, written
from helpers.fake_grid import FakeGrid
from lalora_app import client_app
from lalora_app.client.site import admit
from lalora_app.data.examples import with_classes
from lalora_app.privacy.policy import PolicyError
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten
from lalora_app.wire import messages
from lalora_app.wire.same_model import MODEL, model_record

OWN = {"data-path": "/no/such/own.jsonl", "max-epsilon": float("inf")}
ASKED = {"input-column": "diagnosis", "label-column": "age", "num-labels": 50}
COLUMNS = [{key: value} for key, value in ASKED.items()]


def of_run(said):
    return {f"data.{key}": value for key, value in said.items()}


def refusal(config, node, kind):
    """Send a client a message without tensors; return its refusal, if it is one."""
    grid = FakeGrid(config, [node])
    ((name, context),) = grid.contexts.items()
    order = messages.TrainRequest("run", 1, 1, 1, 1, {"A": 0, "B": 0}).record()
    run = messages.run_config(flatten(config))
    model = model_record({"weights": "0" * 64})
    content = RecordDict({messages.RUN_CONFIG: run, messages.CONFIG: order, MODEL: model})
    message = Message(content, dst_node_id=name, message_type=kind)
    return client_app.app(message, context).content[messages.CONFIG].get("refusal")


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image)))


def own_file(tmp_path, rows):
    return {**OWN, "data-path": str(written(tmp_path / "own.jsonl", rows))}


def test_a_site_that_says_nothing_means_the_apps_own_columns(tiny):
    keys = of_run(ASKED)
    found = {key: defaults()[key] for key in keys} | {"data.num-labels": 2}  # as the server finds
    admit(tiny(**found), OWN, 1)


def test_a_site_that_says_nothing_takes_part_where_the_server_counts_two_classes(tiny):
    config = tiny(**{"data.num-labels": 0})
    counted = replace(config, data=with_classes(config.data))
    assert admit(counted, OWN, 1).data.class_names == ("0", "1")


@pytest.mark.parametrize("kind", ["query", "train"])
@pytest.mark.parametrize("asked", COLUMNS, ids=lambda asked: next(iter(asked)))
def test_a_run_with_other_columns_is_refused_before_any_data_is_read(tiny, asked, kind, caplog):
    assert refusal(tiny(**of_run(asked)), OWN, kind) == "policy"  # and not "data-path"
    ((key, value),) = asked.items()
    assert f"data.{key}={json.dumps(value)} must be" in caplog.text


@pytest.mark.parametrize("key", ["data-path", "data-cache", "state-path"])
@pytest.mark.parametrize("kind", ["query", "train"])
def test_a_path_from_no_users_home_breaks_a_law_of_the_node_config(tiny, key, kind, caplog):
    assert refusal(tiny(), OWN | {key: "~no-such-user/x"}, kind) == "config"
    assert "'~no-such-user/x' must start with the home folder of an existing user" in caplog.text


@pytest.mark.parametrize("said", [*COLUMNS, ASKED], ids=lambda said: ",".join(said))
def test_a_site_says_what_its_columns_mean(tiny, said):
    config = tiny(**of_run(said))
    admit(config, OWN | said, 1)
    with pytest.raises(PolicyError, match="must be"):
        admit(tiny(), OWN | said, 1)
    assert refusal(config, OWN | said, "query") == "data-path"  # the file is asked for, then


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input-column", 1),
        ("label-column", True),
        ("num-labels", "2"),
        ("num-labels", 2.0),
        ("num-labels", True),
    ],
)
def test_a_word_of_the_wrong_type_is_named_in_one_line(tiny, key, value):
    with pytest.raises(ConfigError, match=f"^node config {key}={value!r} must be a.*") as caught:
        admit(tiny(), OWN | {key: value}, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", COLUMNS, ids=lambda said: next(iter(said)))
def test_a_simulated_client_has_the_runs_columns_and_no_own(tiny, said):
    node = {"partition-id": 0, "num-partitions": 2}
    admit(tiny(**of_run(said)), node, 1)
    ((key, value),) = said.items()
    with pytest.raises(ConfigError, match=f"^node config {key}={value!r} needs data-path$"):
        admit(tiny(**of_run(said)), node | said, 1)


ROWS = [{"text": f"hello {i}", "label": i % 2} for i in range(60)]
BAD_ROWS = {
    "a label out of range": {"text": "hello", "label": 2},
    "a label that is none": {"text": "hello", "label": None},
    "an empty text": {"text": " ", "label": 1},
    "no text": {"text": None, "label": 1},
}


@pytest.mark.parametrize("kind", ["query", "train"])
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_server_is_not_told_what_is_wrong_with_a_row_and_the_sites_log_is(
    bad, kind, tiny, tiny_llama, tmp_path, caplog
):
    keys = {"model.name": tiny_llama, "model.task": "causal-lm", "data.partitioner": "iid"}
    node = own_file(tmp_path, [*ROWS, BAD_ROWS[bad]])
    assert refusal(tiny(**keys), node, kind) == "rows"
    assert "row 60" in caplog.text


@pytest.mark.parametrize("bad", [b"damaged", None])
def test_an_image_that_cannot_be_read_is_told_as_a_bad_label_is(
    bad, tiny, tiny_timm, tiny_images, tmp_path, caplog
):
    folder = shutil.copytree(tiny_images, tmp_path / "own")
    if bad:
        (folder / "dark" / "0.png").write_bytes(bad)
    node = {**OWN, "data-path": str(folder), "input-column": "image"}
    node["labels"] = "dark,light"
    sizes = {"model.image-size": 16, "model.image-resize": 16}
    keys = {"model.name": f"timm:{tiny_timm['vit']}", "model.task": "image-classification"}
    config = tiny(
        **keys, **sizes, **of_run({"input-column": "image"}), **{"data.labels": "light,dark"}
    )
    assert refusal(config, node, "query") == ("rows" if bad else None)
    assert ("no readable image" in caplog.text) == bool(bad)


@pytest.mark.parametrize("columns", COLUMNS[:2], ids=lambda said: next(iter(said)))
def test_a_column_that_is_not_there_is_told_as_a_bad_row_is(columns, tiny, tmp_path):
    node = own_file(tmp_path, ROWS) | columns
    assert refusal(tiny(**of_run(columns)), node, "query") == "rows"


def test_a_simulation_is_told_which_key_to_change(tiny, tmp_path):
    data = written(tmp_path / "all.jsonl", [*ROWS, BAD_ROWS["a label out of range"]])
    node = {"partition-id": 0, "num-partitions": 2}
    assert refusal(tiny(**{"data.name": str(data)}), node, "query") == "data.labels"


def test_a_site_without_labels_takes_part_in_a_language_models_run(tiny, tiny_llama, tmp_path):
    node = own_file(tmp_path, [{"text": f"hello {i}"} for i in range(60)])
    keys = {"model.name": tiny_llama, "model.task": "causal-lm", "data.label-column": "none"}
    config = tiny(**keys, **{"data.partitioner": "iid"})
    assert refusal(config, node, "query") == "policy"
    assert refusal(config, node | {"label-column": "none"}, "query") is None


# --- the classes of a site's own rows ---------------------------------------------------------


def classes(names, count=2):
    return {"data.labels": names, "data.num-labels": count}


def labels_of(tiny, node, run_names, count=2):
    """The labels of a site's rows, by the names of the run's outputs."""
    config = tiny(**classes(run_names, count))
    names = config.data.class_names
    return [names[label] for label in admit(config, node, 1).examples(config).labels]


@pytest.mark.parametrize("order", ["ham,spam", "spam,ham"])
def test_a_site_s_names_are_read_in_the_run_s_order(order, tiny, tmp_path):
    said = ["ham", "spam"] * 30
    rows = [{"text": f"hello {i}", "label": name} for i, name in enumerate(said)]
    node = own_file(tmp_path, rows) | {"labels": "ham,spam"}
    assert labels_of(tiny, node, order) == said


def test_a_site_s_integers_are_positions_among_names(tiny, tmp_path):
    assert labels_of(tiny, own_file(tmp_path, ROWS), "ham,spam") == ["ham", "spam"] * 30


def test_a_site_s_integers_are_the_run_s_integers(tiny, tmp_path):
    assert labels_of(tiny, own_file(tmp_path, ROWS), "1,0") == ["0", "1"] * 30


DIFFERENT = {
    "other names": ({"labels": "ham,spam"}, "ham,junk", 2),
    "fewer names": ({"labels": "a,b,c"}, "a,b", 2),
    "more names": ({"labels": "a,b"}, "a,b,c", 3),
    "another number": ({"num-labels": 2}, "a,b,c", 3),
    "stars for integers from 0": ({"num-labels": 5}, "1,2,3,4,5", 5),
    "nothing said": ({}, "a,b,c", 3),
}


@pytest.mark.parametrize("kind", ["query", "train"])
@pytest.mark.parametrize("case", list(DIFFERENT))
def test_a_run_with_other_classes_is_refused_before_any_data_is_read(case, kind, tiny, tmp_path):
    said, run_names, count = DIFFERENT[case]
    node = {**OWN, "data-path": str(tmp_path / "nowhere.jsonl")} | said
    assert refusal(tiny(**classes(run_names, count)), node, kind) == "policy"


@pytest.mark.parametrize(
    "said",
    [{"labels": "a"}, {"labels": "a,a"}, {"labels": "auto"}, {"labels": "a,b", "num-labels": 3}],
)
def test_classes_of_a_node_config_obey_a_law(said, tiny):
    with pytest.raises(ConfigError, match=r"^node config (num-)?labels="):
        admit(tiny(**classes("a,b")), OWN | said, 1)


def test_class_folders_of_a_site_must_be_named_in_its_node_config(
    tiny, tiny_timm, tiny_images, tmp_path, caplog
):
    """A site that lacks a class has other positions than the run, which nobody would notice."""
    folder = shutil.copytree(tiny_images, tmp_path / "own")
    node = {**OWN, "data-path": str(folder), "input-column": "image", "num-labels": 3}
    keys = {"model.name": f"timm:{tiny_timm['vit']}", "model.task": "image-classification"}
    keys |= of_run({"input-column": "image"}) | classes("dark,grey,light", 3)
    keys |= {"model.image-size": 16, "model.image-resize": 16, "train.batch-size": 4}
    config = tiny(**keys)
    assert refusal(config, node, "query") == "rows"
    assert "has label 'dark', which must be one of '0', '1', '2'" in caplog.text
    named = {key: node[key] for key in node if key != "num-labels"} | {"labels": "dark,grey,light"}
    examples = admit(config, named, 1).examples(config)
    assert set(examples.labels) == {0, 2}
    lightest = max(range(len(examples)), key=lambda i: np.mean(pixels(examples.contents[i])))
    assert examples.labels[lightest] == 2


# --- the format of a site's own files ---------------------------------------------------------


def test_a_site_s_file_is_read_by_its_own_format_and_not_the_server_s(tiny, tmp_path):
    rows = "".join(f"caf\u00e9 {i}~{i % 2}\n" for i in range(60))
    file = tmp_path / "own.csv"
    file.write_bytes(f"text~label\n{rows}".encode("cp1252"))
    node = {**OWN, "data-path": str(file), "encoding": "cp1252", "separator": "~"}
    config = tiny(**classes("0,1"), **{"data.encoding": "utf-16", "data.separator": "tab"})
    examples = admit(config, node, 1).examples(config)
    assert examples.contents[0] == "caf\u00e9 0"
    assert len(examples) == 60
    assert refusal(config, {**OWN, "data-path": str(file)}, "query") == "data-path"


@pytest.mark.parametrize(
    "said",
    [{"encoding": "no-such"}, {"separator": ""}, {"white-level": -1.0}, {"white-level": "x"}],
)
def test_a_format_of_a_node_config_obeys_a_law(said, tiny):
    ((key, value),) = said.items()
    with pytest.raises(ConfigError, match=rf"^node config {key}={value!r} must be"):
        admit(tiny(), OWN | said, 1)
    with pytest.raises(ConfigError, match="needs data-path"):
        admit(tiny(), {"partition-id": 0, "num-partitions": 2} | said, 1)


def test_a_site_s_white_level_may_be_an_integer(tiny):
    assert admit(tiny(), OWN | {"white-level": 4095}, 1).data.white_level == 4095.0
