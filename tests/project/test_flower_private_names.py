"""Parts of Flower that are not public, by the feature that breaks when one of them changes.

Flower may change them in any minor version, so pyproject.toml allows only versions for which these
tests have passed. Each failure names the installed version and the feature.
"""

import importlib
import inspect
import io
import json
import logging
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, Message, RecordDict

from conftest import ROOT
from helpers import fake_grid
from lalora_app.simulation import flower_commands, flower_engine
from lalora_app.simulation.run_log import Kind, read_line

FLOWER = f"Flower {version('flwr')}"
SECAGG = "flwr.common.secure_aggregation"
NAMES = {
    f"{SECAGG}.crypto.shamir.create_shares": "an oracle of tests: shares of secrets",
    f"{SECAGG}.crypto.shamir.combine_shares": "an oracle of tests: rebuilding secrets",
    f"{SECAGG}.crypto.symmetric_encryption.encrypt": "secure aggregation: encrypted shares",
    f"{SECAGG}.crypto.symmetric_encryption.decrypt": "secure aggregation: encrypted shares",
    f"{SECAGG}.secaggplus_utils.share_keys_plaintext_concat": "secure aggregation: packed shares",
    f"{SECAGG}.secaggplus_utils.share_keys_plaintext_separate": "secure aggregation: packed shares",
    "flwr.serverapp.strategy.fedtrimmedavg.trim_mean": 'robust="trimmed-mean"',
    "flwr.serverapp.strategy.multikrum.select_multikrum": 'robust="krum"',
    "flwr.supercore.task_identity.TaskIdentity": "lalora run --engine local: building messages",
    "flwr.common.serde.message_to_proto": "lalora run --engine local: sending messages",
    "flwr.common.serde.message_from_proto": "lalora run --engine local: receiving messages",
    "flwr.common.serde.recorddict_to_proto": "lalora run --engine local: the state of a client",
    "flwr.common.serde.recorddict_from_proto": "lalora run --engine local: the state of a client",
    "flwr.proto.recorddict_pb2.RecordDict": "lalora run --engine local: the state of a client",
    "flwr.common.serde.context_to_proto": "contexts in tests",
    "flwr.common.serde.context_from_proto": "contexts in tests",
    "flwr.proto.message_pb2.Message": "lalora run --engine local: receiving messages",
    "flwr.proto.message_pb2.Context": "worker=true in a node config: handing a message over",
    "flwr.common.config.parse_config_args": "the tests of lalora run's overrides",
}


def breaks(feature: str, detail: str = "") -> str:
    return f"{FLOWER} breaks: {feature}. {detail}"


def found(name: str) -> object:
    """Return the object of a dotted name; None if it is not there."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


@pytest.mark.parametrize("name", list(NAMES))
def test_each_private_name_is_there(name):
    assert found(name) is not None, breaks(NAMES[name], f"{name} is gone")


def private_imports(folder: str) -> set[str]:
    """Return the dotted names that the files of a folder import from Flower's private modules."""
    public = {"flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.serverapp.strategy"}
    names: set[str] = set()
    for path in set((ROOT / folder).rglob("*.py")) - {Path(__file__)}:
        text = path.read_text("utf-8")
        for module, parts in re.findall(
            r"^ *from (flwr(?:\.\S+)?) import (\([^)]+\)|.+)$", text, re.M
        ):
            listed = [part.split(" as ")[0].strip(" ()\n") for part in parts.split(",")]
            names |= {f"{module}.{part}" for part in listed if part and module not in public}
    return names


def test_no_private_name_is_missing_here():
    used = set().union(*map(private_imports, ("lalora_app", "tests", "benchmarks", "scripts")))
    assert used == set(NAMES)


def test_an_array_is_a_header_of_npy_and_the_numbers():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = Array(array)
    feature = "the check of received tensors in lalora_app/wire/tensors.py"
    assert packed.stype == "numpy.ndarray", breaks(feature, packed.stype)
    assert packed.data.startswith(b"\x93NUMPY"), breaks(feature, "arrays are not in npy format")
    assert packed.data.endswith(array.tobytes()), breaks(feature, "the numbers are not at the end")
    header = packed.data[: -array.nbytes]
    empty = Array(np.zeros_like(array)).data[: -array.nbytes]
    assert header == empty, breaks(feature, "the header depends on the numbers")


def test_a_message_can_be_given_an_id():
    fake_grid.identify()
    message = Message(RecordDict(), dst_node_id=2, message_type="query")
    message.metadata.__dict__["_message_id"] = "x"
    given = message.metadata.message_id
    assert given == "x", breaks("the grid of tests and benchmarks", "Metadata has no _message_id")


def test_shares_of_a_secret_rebuild_it():
    create, combine = (found(f"{SECAGG}.crypto.shamir.{n}_shares") for n in ("create", "combine"))
    shares = create(b"k" * 48, 2, 3)
    assert combine(shares[1:]) == b"k" * 48, breaks("secure aggregation: dropouts")


def test_robust_means_take_the_arguments_that_are_passed():
    trim = inspect.signature(found("flwr.serverapp.strategy.fedtrimmedavg.trim_mean"))
    krum = inspect.signature(found("flwr.serverapp.strategy.multikrum.select_multikrum"))
    assert len(trim.parameters) >= 2, breaks('robust="trimmed-mean"', str(trim))
    assert len(krum.parameters) >= 3, breaks('robust="krum"', str(krum))


def constants(name: str) -> set[str]:
    from flwr.common import constant

    words = vars(getattr(constant, name)).items()
    return {word for key, word in words if key.isupper()}


def test_the_status_words_are_those_that_lalora_run_knows():
    feature = "the exit code of lalora run"
    known = {*flower_commands._UNFINISHED, flower_commands._FINISHED.rstrip(":")}
    assert constants("Status") == known, breaks(feature, str(constants("Status")))
    sub = constants("SubStatus")
    assert sub == {flower_commands.COMPLETED, "failed", "stopped"}, breaks(feature, str(sub))


def test_flwr_list_prints_status_and_details_in_its_json():
    from flwr.cli import ls

    row = inspect.signature(ls.RunRow)
    values = {name: 0 for name in row.parameters}
    values |= {"run_id": 7, "status_text": "finished:failed", "details": "no Ray", "fab_id": "a/b"}
    (run,) = json.loads(ls._to_json([ls.RunRow(**values)]))["runs"]
    feature = "the reason of a failed run in lalora run"
    assert run.get("status") == "finished:failed", breaks(feature, str(run))
    assert run.get("status-details") == "no Ray", breaks(feature, str(run))


@pytest.mark.parametrize(
    "name", ["run", "list", "log"], ids=["lalora run starts", "lalora run ends", "lalora run shows"]
)
def test_the_flwr_command_has_the_options_that_lalora_run_passes(name):
    from flwr.cli.app import app
    from typer.main import get_command

    commands = get_command(app).commands
    needed = {
        "run": {"--format", "--federation-config", "--run-config"},
        "list": {"--format", "--run-id"},
        "log": {"--stream"},
    }[name]
    assert name in commands, breaks("lalora run", f"there is no flwr {name}")
    options = {text for p in commands[name].params for text in p.opts}
    assert needed <= options, breaks("lalora run", f"flwr {name} lacks {needed - options}")


@pytest.mark.parametrize("colored", [True, False])
@pytest.mark.parametrize("timestamps", [True, False])
@pytest.mark.parametrize(("level", "kind"), [("INFO", Kind.NOTE), ("WARNING", Kind.WARNING)])
def test_a_line_of_flower_s_log_is_level_colon_message(colored, timestamps, level, kind):
    from flwr.supercore.logger import LOGGER_NAME, ConsoleHandler

    stream = io.StringIO()
    handler = ConsoleHandler(timestamps=timestamps, colored=colored, stream=stream)
    number = getattr(logging, level)
    handler.emit(logging.LogRecord("flwr", number, "", 0, "LaLoRA a %s", ("text",), None))
    event = read_line(stream.getvalue())
    feature = "the progress of lalora run, which shows the app's lines of Flower's log"
    assert (event.kind, event.text) == (kind, "a text"), breaks(feature, stream.getvalue())
    assert LOGGER_NAME == "flwr", breaks(feature, "the app logs to the logger flwr")


def test_a_superlink_that_starts_too_slowly_is_recognised():
    from flwr.cli import local_superlink

    text = inspect.getsource(local_superlink)
    assert flower_commands._TOO_SLOW in text, breaks("the second try to start a SuperLink")


@pytest.mark.parametrize("name", ["FLWR_HOME", "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"])
def test_the_environment_variables_of_a_launch_are_flower_s(name, tmp_path):
    assert name in flower_engine._environment(tmp_path)
    folder = importlib.import_module("flwr").__path__[0]
    texts = (path.read_text("utf-8") for path in sorted(Path(folder).rglob("*.py")))
    feature = "lalora run beside another SuperLink of the same user"
    assert any(f'"{name}"' in text for text in texts), breaks(feature, f"{name} is not read")


def test_pyproject_allows_tested_minor_versions_only():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    low, high = re.search(r'"flwr\[simulation\]>=1\.(\d+)\.0,<1\.(\d+)"', text).groups()
    minor = int(version("flwr").split(".")[1])
    assert int(low) <= minor == int(high) - 1
