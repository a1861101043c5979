"""A node's own device stands over the run's, and a wrong one is named in its log."""

import pytest

from helpers.app_runs import open_run
from helpers.fake_grid import FakeGrid
from lalora_app import server_app
from lalora_app.settings.errors import ConfigError


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("value", ["mps", "xpu", 7])
def test_an_unsupported_device_of_a_node_is_one_line_in_its_log(value, tiny, caplog):
    grid = FakeGrid(tiny(**open_run()), [{"device": value}, {}])
    with pytest.raises(ConfigError, match="node config breaks a law"):
        server_app.run(grid, tiny(**open_run()))
    assert f'node config device={value!r} must be "auto", "cpu", "cuda" or "cuda:N"' in caplog.text
    assert grid.trained() == []
