"""Hashes of base models on the wire, and the refusal of another base model."""

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from lalora_app.wire import same_model
from lalora_app.wire.same_model import MODEL, OtherModelError
from lalora_app.wire.tensors import WireError

OWN = {"weights": "a" * 64, "tokenizer": "b" * 64}


def test_equal_hashes_are_accepted():
    same_model.check_same_model("clinic-7", dict(OWN), OWN)


@pytest.mark.parametrize("part", list(OWN))
def test_another_part_is_named_with_both_hashes_and_the_site_in_one_line(part):
    with pytest.raises(OtherModelError) as caught:
        same_model.check_same_model("clinic-7", OWN | {part: "c" * 64}, OWN)
    text = str(caught.value)
    assert text == (
        'site "clinic-7" must have the base model of the server: '
        f"{part} {'c' * 12} at the site, {OWN[part][:12]} at the server"
    )


def test_a_part_that_the_site_does_not_have_is_named():
    with pytest.raises(OtherModelError, match="tokenizer none at the site, bbbbbbbbbbbb"):
        same_model.check_same_model("clinic-7", {"weights": "a" * 64}, OWN)


def test_hashes_survive_the_record():
    content = RecordDict({MODEL: same_model.model_record(OWN)})
    assert same_model.model_of(content) == OWN


@pytest.mark.parametrize(
    "record",
    [
        *(ConfigRecord(), MetricRecord({"weights": 1}), ConfigRecord({"weights": 7})),
        *(ConfigRecord({"weights": "A" * 64}), ConfigRecord({"weights": "a" * 63})),
        *(ConfigRecord(OWN | {"tokenizer": "x\n"}), ConfigRecord(OWN | {"other": [1]})),
    ],
)
def test_anything_but_hashes_is_a_wire_error(record):
    with pytest.raises(WireError, match="must hold SHA-256 hashes"):
        same_model.model_of(RecordDict({MODEL: record}))
    with pytest.raises(WireError, match="must hold SHA-256 hashes"):
        same_model.model_of(RecordDict())
