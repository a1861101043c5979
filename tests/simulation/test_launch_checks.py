"""The process that checks a launch, the config of a resumed run, and a hub that does not answer."""

import json
import math
import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest

from conftest import ROOT, defaults
from lalora_app.cli import main
from lalora_app.data.labels import positions
from lalora_app.results.run_folder import RunFolder, to_toml
from lalora_app.settings.errors import ConfigError, DataError
from lalora_app.simulation import launch_checks, start
from lalora_app.simulation.launch import Launch, read_launch
from lalora_app.simulation.launch_checks import check_launch, go_offline_without_hub, needs_hub
from lalora_app.simulation.own_processes import ProcessEndedError, call_in_own_processes


def test_a_result_and_an_error_come_back_from_the_other_process():
    first, second, power = call_in_own_processes(
        (os.getpid, ()), (os.getpid, ()), (math.pow, (2.0, 3.0))
    )
    assert len({first, second, os.getpid()}) == 3
    assert power == 8.0
    with pytest.raises(DataError, match=r"^data\.labels: row 0 has label 'x'") as caught:
        call_in_own_processes(
            (math.sqrt, (4.0,)),
            (positions, (("x",), ("a", "b"))),
            (time.sleep, (60,)),
        )
    assert caught.value.key == "data.labels"


def test_a_process_that_is_killed_is_an_error():
    with pytest.raises(ProcessEndedError, match="ended from outside"):
        call_in_own_processes((os._exit, (9,)))


def test_an_interrupted_check_leaves_no_process():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt), start._interruptible():  # as a launch is
        call_in_own_processes((time.sleep, (60,)), (time.sleep, (60,)))
    after = psutil.Process().children(recursive=True)
    assert {child.pid for child in after if child.name().startswith("python")} <= before


def test_a_comparison_is_checked_under_the_name_of_its_first_bad_run(tmp_path, capsys):
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'output = "{tmp_path / "out"}"\ndata.input-column = "x"\n'
        '[compare]\nseeds = [0, 1]\nmethods = ["dp-lora", "rolora"]\nepsilons = [1.0]\n',
        "utf-8",
    )
    assert main.main(["compare", str(plan), "--app", str(ROOT)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith('lalora: dp-lora-eps1-seed0: data.input-column="x" must be a column')


# --- a resumed run ----------------------------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path):
    """The folder of a run with keys of its own and three clients."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = tiny(**{"num-server-rounds": 6, "lora.rank": 3})
    (folder / "config.toml").write_text(to_toml(config), "utf-8")
    RunFolder(folder).write_json("clients.json", {"clients": 3})
    return folder, config


def test_a_resumed_run_takes_its_own_config_and_number_of_clients(saved):
    folder, config = saved
    read = read_launch(ROOT, [f'resume-from="{folder}"'])
    assert read.config.num_server_rounds == 6
    assert read.config.model == config.model
    assert read.nodes == 3
    assert read.values["lora.rank"] == 3
    assert read.values["resume-from"] == str(folder)


def test_a_resumed_run_is_not_given_another_value(saved):
    folder, _ = saved
    with pytest.raises(ConfigError, match=r"^lora\.rank=5 must be 3, as in resume-from$"):
        read_launch(ROOT, [f'resume-from="{folder}" lora.rank=5'], None)
    launch = read_launch(ROOT, [f'resume-from="{folder}" lora.rank=3'], 3)
    assert launch.nodes == 3


def test_a_resumed_run_is_not_given_another_number_of_clients(saved):
    folder, _ = saved
    with pytest.raises(ConfigError, match=r"^--nodes 7 must be 3, as in resume-from$"):
        read_launch(ROOT, [f'resume-from="{folder}"'], 7)


@pytest.mark.parametrize("text", ["{", "[]", '{"clients": "x"}', "{}", ""])
def test_a_damaged_file_of_the_number_of_clients_is_named(text, saved):
    folder, _ = saved
    (folder / "clients.json").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"clients\.json must be an object"):
        read_launch(ROOT, [f'resume-from="{folder}"'], None)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(ConfigError, match=r"^resume-from=.* must be the folder of a run$"):
        read_launch(ROOT, [f'resume-from="{tmp_path}"'], None)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_an_unfinished_run_with_a_checkpoint_tells_how_it_goes_on(checkpoint, saved, tmp_path):
    folder, config = saved
    if checkpoint:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "attempt-1.safetensors").touch()
    launch = Launch(config, {}, 3, ROOT)
    lines = start._how_to_go_on(launch, str(folder), "local")
    expected = f"to continue the run: lalora run {ROOT} -c 'resume-from=\"{folder}\"'"
    assert lines == ([expected] if checkpoint else [])
    assert start._how_to_go_on(launch, "", "local") == []


@pytest.mark.parametrize(
    ("changes", "engine", "options"),
    [
        ({}, "flower", "--engine flower"),
        ({"workers": 1}, "local", "--workers 1"),
        ({"clients_per_gpu": 2}, "flower", "--engine flower --clients-per-gpu 2"),
    ],
)
def test_an_unfinished_run_goes_on_with_the_options_of_its_command(changes, engine, options, saved):
    folder, config = saved
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "attempt-1.safetensors").touch()
    (line,) = start._how_to_go_on(Launch(config, {}, 3, ROOT, **changes), str(folder), engine)
    resume = f"-c 'resume-from=\"{folder}\"'"
    assert line == f"to continue the run: lalora run {ROOT} {options} {resume}"


# --- the hub ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, False),  # the tiny model and data of the tests are folders
        ({"model.name": "bert-base-uncased"}, True),
        ({"data.name": "stanfordnlp/sst2"}, True),
        ({"model.name": "demo:all-MiniLM-L6-v2", "data.name": "demo:sms-spam"}, False),
        ({"model.name": "timm:vit_tiny", "model.weights": "random"}, False),
        ({"model.name": "timm:vit_tiny", "model.weights": "pretrained"}, True),
        ({"model.name": "timm:/a/folder"}, False),
    ],
)
def test_only_names_of_the_hub_need_the_hub(changes, asked, tiny):
    assert needs_hub(Launch(tiny(**changes), {}, 2)) is asked


@pytest.mark.parametrize(("data", "asked"), [("demo:sms-spam", False), ("imdb", True)])
def test_a_comparison_needs_the_hub_if_one_of_its_runs_does(data, asked, tiny, tmp_path):
    file = tmp_path / "plan.json"
    own = {"seeds": [0], "methods": ["dp-lora"], "epsilons": [1.0]}
    file.write_text(json.dumps({"compare": own, "data.name": data}), "utf-8")
    launch = Launch(tiny(compare=str(file)), defaults(), 2)
    assert needs_hub(launch) is asked


@pytest.fixture
def hub(monkeypatch):
    """A server in place of the hub; its address."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_is_used(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub)
    assert not go_offline_without_hub()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_hub_that_does_not_answer_is_not_asked_again(hub, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert go_offline_without_hub()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not go_offline_without_hub()  # already decided


def test_the_first_check_needs_no_process(tiny, monkeypatch):
    monkeypatch.setattr(
        launch_checks, "call_in_own_processes", lambda *args: pytest.fail("started")
    )
    with pytest.raises(ConfigError, match="--nodes 1"):
        check_launch(Launch(tiny(**{"min-clients": 2}), {}, 1))
