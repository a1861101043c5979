"""What privacy.json says about the mechanism."""

import pytest

from conftest import make_config
from lalora_app.server.ending import _mechanism


@pytest.mark.parametrize(
    ("clipping", "said"),
    [
        ("flat", "clipped to 0.5"),
        ("automatic", "scaled by automatic clipping to norms below 0.5"),
    ],
)
def test_the_privacy_report_names_the_clipping(clipping, said):
    privacy = make_config(**{"privacy.clipping": clipping}).privacy
    assert _mechanism(privacy) == f"Gaussian, on sums of gradients {said}"
