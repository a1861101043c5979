"""The digest of a checkpoint covers types, shapes and bytes of its tensors."""

from dataclasses import fields

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from helpers.app_runs import same_bits
from lalora_app.results import checkpoints
from lalora_app.server_state.state import ServerState

CHANGES = {"shape": lambda x: x.reshape(3, 2), "type": lambda x: x.view(np.int32)}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_bytes_of_another_type_or_shape_are_damage(change, tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    checkpoints.save(tmp_path, ServerState({"l.lora_A.weight": values}))
    (path,) = tmp_path.glob("*.safetensors")
    checkpoints.load(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file({"l.lora_A.weight": CHANGES[change](values)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="digest"):
        checkpoints.load(path)


def test_every_part_of_the_state_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    parts = [
        {"l.lora_A.weight": rng.standard_normal((2, 3)).astype(np.float32), "bias": np.float32([i])}
        for i in range(6)
    ]
    state = ServerState(
        parts[0], 3, {"A": 1, "B": 2}, 4, *parts[1:5], averaged=2, memory=parts[5], ranks={0: 3}
    )
    checkpoints.save(tmp_path, state)
    (path,) = tmp_path.glob("*.safetensors")
    found = checkpoints.load(path)
    for field in fields(ServerState):
        ours, theirs = getattr(found, field.name), getattr(state, field.name)
        assert type(ours) is type(theirs), field.name
        if field.name in ("round", "versions", "attempts", "averaged", "ranks"):
            assert ours == theirs, field.name
        else:
            assert same_bits(ours, theirs), field.name
