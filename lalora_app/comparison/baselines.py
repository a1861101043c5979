"""The baselines that ``compare.baselines`` adds to a plan, and the keys of a run with all data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lalora_app.methods.compatibility import CENTRAL
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Scalar, clients_per_round

HEAD_ONLY = "head-only"
BASELINES = "baselines"


def central_label(method: str) -> str:
    """Return the label of a method's line in which one client has all data."""
    return f"{method} (one client with all data)"


def with_central_keys(own: Mapping[str, Scalar], nodes: int) -> dict[str, Scalar]:
    """Return the keys of a cell; those of a ``central`` cell fit its one client.

    Law: the expected batch of the one client is that of all clients of a round together,
    ``train.batch-size`` · max(1, round(``fraction-train`` · nodes)).

    Args:
        own: the keys of the cell; values of a wrong type stay, for the parser to report.
        nodes: the number of simulated clients of the other cells.
    """
    if own.get("central") is not True:
        return dict(own)
    batch, fraction = own["train.batch-size"], own["fraction-train"]
    if type(batch) is int and isinstance(fraction, int | float) and 0 < fraction <= 1:
        batch *= clients_per_round(fraction, nodes)
    return {**own, **CENTRAL, "train.batch-size": batch}


def with_baselines(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``compare`` table with the lines that ``baselines = true`` asks for.

    ε = inf joins the values of ε; "head-only" joins the methods; a control trains the first method
    at one client with all data. What the table has already is not added again.

    Args:
        settings: the whole table; ``methods``, ``epsilons`` and ``controls`` are lists.

    Returns:
        The table with ``baselines = false``: a second call changes nothing.

    Raises:
        ConfigError: if ``baselines`` is no boolean, or is true without a method.
    """
    wanted, methods = settings[BASELINES], settings["methods"]
    if type(wanted) is not bool:
        raise ConfigError(f"compare.baselines={wanted!r} must be true or false")
    if not wanted:
        return dict(settings)
    if not methods:
        raise ConfigError("compare.methods=[] must name a method while compare.baselines=true")
    first, controls = str(methods[0]), list(settings["controls"])
    central = {"method": first, "label": central_label(first), "config": {"central": True}}
    if central["label"] not in [control.get("label") for control in controls]:
        controls.append(central)
    return {
        **settings,
        BASELINES: False,
        "methods": _joined(methods, HEAD_ONLY),
        "epsilons": _joined(settings["epsilons"], math.inf),
        "controls": controls,
    }


def _joined(values: Sequence[Any], more: Any) -> list[Any]:
    return [*values, *([] if more in values else [more])]
