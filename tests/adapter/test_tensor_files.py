"""A file of tensors has their content, whatever their order in memory."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from lalora_app.adapter.tensor_files import save_tensors

WHOLE = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
VIEWS = {
    "rows one by one": WHOLE,
    "transposed": WHOLE.T,
    "picked columns": -WHOLE[:, [1, 3]],
    "every second row": WHOLE[::2],
    "backwards": WHOLE[::-1, ::-1],
    "one number": np.float32(3),
    "nothing": WHOLE[:, :0],
}


@pytest.mark.parametrize("view", VIEWS)
def test_every_order_in_memory_is_saved_as_it_is_read(view, tmp_path):
    array = np.asarray(VIEWS[view])
    save_tensors({"x": array, "y": WHOLE}, tmp_path / "file", {"key": "text"})
    found = load_file(tmp_path / "file")
    assert found["x"].shape == array.shape
    np.testing.assert_array_equal(found["x"], array)
    np.testing.assert_array_equal(found["y"], WHOLE)
