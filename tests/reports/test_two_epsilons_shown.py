"""Tables, report, model card and result lines of shared noise: both ε, and who for which."""

import csv
import io
from dataclasses import replace

from conftest import make_config
from helpers.made_up_runs import record
from lalora_app.reports.page import to_html
from lalora_app.reports.tables import rows_of, to_csv, to_text
from lalora_app.results.model_card import privacy_sentence
from lalora_app.results.run_folder import RunFolder
from lalora_app.server.ending import _privacy_report, _results, _summary

OWN = record("dp-lora")
PLAIN = record("rolora", seed=1)
SHARED = replace(PLAIN, summary={**PLAIN.summary, "epsilon_alone": 11.256})


def test_tables_have_a_column_more_only_where_noise_was_shared():
    assert "alone" not in to_text(rows_of([OWN, PLAIN]))
    assert "alone" not in to_csv([OWN, PLAIN])
    head, first, second = to_text(rows_of([OWN, SHARED])).splitlines()
    place = head.index("ε alone")
    assert first[place:].split()[0] == "–"
    assert second[place:].split()[0] == "11.26"
    lines = list(csv.DictReader(io.StringIO(to_csv([OWN, SHARED]))))
    assert [line["epsilon_alone"] for line in lines] == ["", "11.256"]


def test_a_row_has_the_largest_of_its_seeds():
    other = replace(SHARED, seed=2, summary={**SHARED.summary, "epsilon_alone": 12.0})
    assert [row.epsilon_alone for row in rows_of([SHARED, other, PLAIN])] == [12.0]


def test_the_page_says_who_must_be_honest_for_which_number():
    page = to_html([SHARED], "title")
    assert ">11.26<" in page
    assert "In rolora the clients shared the noise of each sum." in page
    assert "The ε above holds against the server, other clients and users of the model" in page
    assert "A second ε, at most 11.26, holds against a server that opens" in page
    assert to_html([PLAIN], "title").count("alone") == to_html([OWN], "title").count("alone")


def test_the_model_card_has_both_numbers_and_the_old_one_does_not_change():
    config = make_config()
    own, shared = privacy_sentence(config, 2.9), privacy_sentence(config, 2.9, 11.256)
    assert "| ε if one client's uploads are opened (ledger) | 11.26 |\n| ε, lower bound" in shared
    assert "The first ε holds against" in shared
    assert "The second ε holds against" in shared
    assert "opened" not in own
    assert "only the client's own program" not in own
    assert privacy_sentence(config, 2.9, 0.0).count("| 0.00 |") == 1


def test_the_end_of_a_run_writes_the_second_number_where_the_history_has_one(tmp_path):
    config, row = make_config(), OWN.history[-1]
    shared = {**row, "epsilon_alone": 11.256}
    for made in (_summary(config, [row], 1.0), _privacy_report(config, [row])):
        assert "epsilon_alone" not in made
    for empty in ({**row, "epsilon_alone": None}, row):
        line = _results(RunFolder(tmp_path), _summary(config, [empty], 1.0), private=True)
        assert "alone" not in line["privacy"]
    summary = _summary(config, [shared], 1.0)
    assert summary["epsilon_alone"] == _privacy_report(config, [shared])["epsilon_alone"] == 11.256
    assert _results(RunFolder(tmp_path), summary, private=True)["privacy"].endswith(", 11.26 alone")
