"""The model card's code: run as it stands, it says what the run's own model says."""

import re

import numpy as np
import pytest
import torch

from lalora_app.data.examples import Examples
from lalora_app.models.backbone import build
from lalora_app.results.peft_export import export
from lalora_app.server_state.state import ServerState

TEXTS = ("free prize call", "ok", "hello dear friend see you later free prize call now ok hello")
OTHERS = ("see you later", "free prize", "ok")
LINES = {
    "texts": {"data.input-column": "text", "model.pooling": "model"},
    "the mean of texts": {"data.input-column": "text", "model.pooling": "mean"},
    "the mean of pairs": {"data.input-column": "text,other", "model.pooling": "mean"},
    "pairs of texts": {"data.input-column": "text,other", "model.pooling": "model"},
}


@pytest.fixture(autouse=True)
def _own_folder_of_code(code_of_models):
    """The card runs the code in the adapter's folder."""


@pytest.mark.parametrize("case", LINES)
def test_the_cards_code_gives_the_logits_of_the_run(case, tiny, tmp_path):
    config = tiny(**LINES[case] | {"data.labels": "ham,spam"})
    backbone, start = build(config)
    rng = np.random.default_rng(0)
    adapter = {name: rng.normal(0, 0.5, a.shape).astype(np.float32) for name, a in start.items()}
    row = {"round": 2, "accuracy": 0.5, "epsilon_max": 1.0}
    export(backbone, ServerState(adapter), tmp_path, config, row)
    contents = tuple(zip(TEXTS, OTHERS, strict=True)) if "pairs" in case else TEXTS
    encoded = backbone.encode(Examples(contents, (0, 0, 0)))
    with torch.no_grad():
        expected = backbone.logits(encoded.batch([0, 1, 2]))

    card = (tmp_path / "README.md").read_text("utf-8")
    logits_code, pipeline_code = re.findall("```python\n(.*?)```", card, re.DOTALL)
    names = {"texts": list(TEXTS), "others": list(OTHERS)}
    exec(logits_code.replace("path/to/this/folder", str(tmp_path)), names)
    torch.testing.assert_close(names["logits"], expected)

    assert "Classes: 0 = ham, 1 = spam." in card
    exec(pipeline_code.replace("path/to/this/folder", str(tmp_path)), names)
    for content, likely in zip(contents, expected.softmax(1), strict=True):
        pair = isinstance(content, tuple)
        row = {"text": content[0], "text_pair": content[1]} if pair else content
        found = {entry["label"]: entry["score"] for entry in names["classify"](row, top_k=2)}
        assert found == pytest.approx({"ham": float(likely[0]), "spam": float(likely[1])}, abs=1e-5)
