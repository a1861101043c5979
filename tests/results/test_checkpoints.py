"""The digest of a checkpoint covers types, shapes and bytes of its tensors."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lalora_app.aggregation.server_state import ServerState
from lalora_app.results import checkpoints

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
