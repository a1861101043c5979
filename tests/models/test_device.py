"""Devices by name: which are supported, and the one line about the others."""

import pytest
import torch

from conftest import make_config
from lalora_app.models import device
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.value_rules import DEVICE_LAW


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has a number of GPUs."""

    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:15"])
def test_supported_devices_are_read(name):
    assert make_config(**{"model.device": name}).model.device == name


UNSUPPORTED = ["mps", "xpu", "xpu:0", "tpu", "meta", "cpu:0", "cuda:", "cuda:-1", "cuda:01", "CUDA"]


@pytest.mark.parametrize("name", [*UNSUPPORTED, "cuda:1\n", "cuda:1000", "cuda:\u0661", ""])
def test_any_other_device_is_one_line_with_key_value_and_law(name):
    with pytest.raises(ConfigError) as caught:
        make_config(**{"model.device": name})
    assert str(caught.value) == f"model.device={name!r} {DEVICE_LAW}"
    assert "\n" not in str(caught.value)
    for word in ('"cuda:N"', "noise generator", "no other device"):
        assert word in DEVICE_LAW


@pytest.mark.parametrize(
    ("count", "name", "expected"),
    [
        *((0, "auto", "cpu"), (2, "auto", "cuda"), (2, "cpu", "cpu"), (1, "cuda", "cuda")),
        *((1, "cuda:0", "cuda:0"), (2, "cuda:1", "cuda:1")),
    ],
)
def test_the_named_device_is_taken(count, name, expected, gpus):
    gpus(count)
    assert device.pick_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("count", "name", "allowed"),
    [
        *((0, "cuda", "auto, cpu"), (0, "cuda:0", "auto, cpu")),
        *((2, "cuda:2", "auto, cpu, cuda:0, cuda:1"), (1, "cuda:7", "auto, cpu, cuda:0")),
    ],
)
def test_a_gpu_that_is_not_there_names_the_number_of_gpus(count, name, allowed, gpus):
    gpus(count)
    with pytest.raises(ConfigError) as caught:
        device.pick_device(name)
    text = f'model.device="{name}" must be one of {allowed}: GPUs visible: {count}'
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_every_gpu_computes_in_bf16_by_default(name):
    gpu = torch.device(name)
    assert device.pick_dtype("auto", gpu) == torch.bfloat16
    assert device.pick_dtype("float32", gpu) == torch.float32
