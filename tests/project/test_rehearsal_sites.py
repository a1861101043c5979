"""The files of a rehearsal hold what the simulation deals to its clients, labels by name."""

import json
import runpy
import sys
from dataclasses import replace

from conftest import ROOT, make_config
from lalora_app.data.examples import with_classes
from lalora_app.data.partition import partition
from lalora_app.results.run_folder import to_toml

SCRIPT = str(ROOT / "scripts" / "rehearsal_sites.py")


def test_every_site_gets_the_examples_of_one_client(tmp_path, monkeypatch):
    rows = [{"text": f"hello {i}", "label": ("spam", "ham")[i % 2]} for i in range(80)]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = make_config(**{"data.name": str(file), "data.num-labels": 0})
    (tmp_path / "run.toml").write_text(to_toml(config), "utf-8")
    options = ["--sites", "3", "-c", str(tmp_path / "run.toml")]
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(tmp_path / "sites"), *options])
    runpy.run_path(SCRIPT, run_name="__main__")
    named = replace(config, data=with_classes(config.data))
    for i, examples in enumerate(partition(named.data, named.seed, 3)):
        lines = (tmp_path / "sites" / f"site-{i}.jsonl").read_text("utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        assert [row["text"] for row in found] == list(examples.contents)
        assert [row["label"] for row in found] == [("ham", "spam")[x] for x in examples.labels]
