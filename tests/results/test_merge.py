"""`lalora merge`: the folder OUT, what it says of itself, and models of timm."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.exported import CLASSES, NAMES, Exported, exported, scores_in_order
from helpers.model_checks import normalised, pixels
from lalora_app.cli import main
from lalora_app.data.encoding import EncodedImages
from lalora_app.results import merge as merge_module
from lalora_app.results.merge import merge

pytestmark = pytest.mark.usefixtures("code_of_models")
MEAN = {"model.pooling": "mean"}
COUNT = 8


@pytest.fixture
def a_run(tiny, tmp_path) -> Exported:
    """A run with three named classes, on the tiny BERT, and the mean-pooling head."""
    return exported(tiny(**MEAN | CLASSES), tmp_path)


def listed(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def executed(code: str) -> Any:
    """The model that the printed code loads."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


# --- OUT --------------------------------------------------------------------------------------


def test_a_folder_with_files_is_refused_and_left_as_it_is(a_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(merge_module, "open_run", None)  # nothing is built before the refusal
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", "utf-8")
    for out in (tmp_path / "out", tmp_path / "out" / "notes.txt"):
        assert main.main(["merge", str(a_run.run.path), str(out)]) == 2
        assert capsys.readouterr().err == (
            f"lalora: OUT={out} must be a new folder or an empty one\n"
        )
    assert listed(tmp_path / "out") == {"notes.txt": b"mine"}


def test_an_empty_folder_and_one_behind_a_link_are_filled(a_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    merge(a_run.run.path, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert listed(tmp_path / "empty") == listed(a_run.merged)


@pytest.mark.parametrize("there", [True, False])
def test_an_error_leaves_no_half_written_folder(there, a_run, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module, "write_processor", no_space)
    out = tmp_path / "new" / "out"
    if there:
        out.mkdir(parents=True)
    with pytest.raises(OSError, match="No space"):
        merge(a_run.run.path, out)
    assert [path.name for path in out.parent.iterdir()] == (["out"] if there else [])


def test_the_command_prints_code_that_loads_the_folder(a_run, tmp_path, capsys):
    out = tmp_path / "weights"
    assert main.main(["merge", str(a_run.run.path), str(out)]) == 0
    told, code = capsys.readouterr().out.split("\n\n")
    assert told == f"lalora: plain weights are in {out}; load them with"
    model = executed(code)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.dtype == torch.float32


# --- timm -------------------------------------------------------------------------------------

IMAGES = pixels(COUNT, 16)
MORE_TIMM = ("swinv2", "beit", "convnext")


def image_logits(done: Exported) -> Tensor:
    batch = EncodedImages.of_one_size(pixels(COUNT, done.config.model.image_size), (0,) * COUNT)
    with torch.no_grad():
        return done.backbone.logits(batch.batch(range(COUNT)))


@pytest.mark.parametrize(
    "kind", ["swin", "vit", *(pytest.param(k, marks=pytest.mark.wide) for k in MORE_TIMM)]
)
def test_a_timm_class_is_built_by_the_printed_code(kind, images, tmp_path, capsys):
    done = exported(images(kind, **CLASSES), tmp_path, drift=kind == "vit")
    assert main.main(["merge", str(done.run.path), str(tmp_path / "out")]) == 0
    code = capsys.readouterr().out.split("\n\n")[1]
    settings = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert settings["label_names"] == list(NAMES)
    with torch.no_grad():
        found = executed(code).eval()(normalised(IMAGES, [0.4] * 3, [0.2] * 3))
    torch.testing.assert_close(found, image_logits(done), rtol=1e-4, atol=1e-5)


def architecture(name: str, folder: Path) -> str:
    """A folder as timm's hub has it, with seven labels of its own."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    settings = {"architecture": name, "num_classes": 7, "label_names": list("abcdefg")}
    settings["pretrained_cfg"] = {"mean": [0.4] * 3, "std": [0.2] * 3, "num_classes": 7}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    return f"timm:{folder}"


# A model of one image size, at another size than its own; and one of any size.
@pytest.mark.parametrize(("name", "size"), [("test_vit", 64), ("test_convnext", 32)])
def test_a_timm_architecture_is_a_folder_of_its_hub(name, size, images, tmp_path, capsys):
    from PIL import Image
    from transformers import pipeline

    sizes = {"model.image-size": size, "model.image-resize": size}
    config = images(architecture(name, tmp_path / "base"), **sizes | CLASSES)
    done = exported(config, tmp_path)
    expected = image_logits(done)
    assert main.main(["merge", str(done.run.path), str(tmp_path / "out")]) == 0
    code = capsys.readouterr().out.split("\n\n")[1]
    stored = pixels(COUNT, size)
    with torch.no_grad():
        found = executed(code).eval()(normalised(stored, [0.4] * 3, [0.2] * 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    classify = pipeline("image-classification", model=str(tmp_path / "out"))
    given = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in stored]
    named = scores_in_order(classify(given, top_k=3, function_to_apply="none"))
    torch.testing.assert_close(named, expected, rtol=1e-4, atol=1e-4)


def test_merged_weights_are_those_of_the_formula(a_run):
    """W + s·B A of every adapted layer, in float64 from the files alone."""
    adapter = load_file(a_run.adapter / "adapter_model.safetensors")
    merged = load_file(a_run.merged / "model.safetensors")
    base = load_file(Path(a_run.config.model.name) / "model.safetensors")
    scale = a_run.config.lora.alpha / a_run.config.lora.rank
    layers = [name for name in adapter if name.endswith("lora_B.weight")]
    assert layers
    for b in layers:
        a = b.replace("lora_B", "lora_A")
        path = b.removeprefix("base_model.model.").replace("lora_B.", "")
        product = adapter[b].double() @ adapter[a].double()
        expected = base[path].double() + scale * product
        torch.testing.assert_close(merged[f"model.{path}"].double(), expected, rtol=0, atol=1e-6)
