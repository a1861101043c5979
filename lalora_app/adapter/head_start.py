"""The head before the first round: as the model was loaded, or zero."""

import numpy as np

from lalora_app.adapter.factors import Adapter, kind
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import AUTO
from lalora_app.settings.run_config import Model


def with_head_start(adapter: Adapter, model: Model) -> Adapter:
    """Return the initial adapter with the head that ``model.head`` asks for.

    Limit: "auto" leaves the adapter unchanged. For "class-means" the head is zero until the class
    means arrive.

    Args:
        adapter: the initial adapter.
        model: the run config's table ``model``.

    Raises:
        ConfigError: for a head of several layers: with zero weights they would never train, and
            the mean of a class is no weight of theirs.
    """
    if model.head == AUTO:
        return adapter
    head = [name for name in adapter if kind(name) == "head"]
    layers = sorted({name.rpartition(".")[0] for name in head})
    if len(layers) != 1:
        raise ConfigError(
            f'model.head="{model.head}" must be "auto" for model.name="{model.name}", whose head '
            f"is not one Linear layer: {', '.join(layers)} train whole"
        )
    return adapter | {name: np.zeros_like(adapter[name]) for name in head}
