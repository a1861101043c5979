"""The client's own limits, from its node config: they cap what any server may ask."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lalora_app.config import ConfigError, full_path
from lalora_app.privacy.ledger import Limit


@dataclass(frozen=True)
class Policy:
    """What a client allows.

    Attributes:
        limit: lifetime (ε, δ) of the client's dataset over all runs; ε = inf: only each run's.
        public_size: whether the client's number of examples may be sent.
    """

    limit: Limit
    public_size: bool


def _number(node_config: Mapping[str, object], key: str, default: float) -> float:
    value = node_config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"node config {key}={value!r} must be a number")
    return float(value)


def read_policy(node_config: Mapping[str, object], run_delta: float, public: bool) -> Policy:
    """Read ``max-epsilon``, ``delta`` and ``public-size`` from the node config.

    Args:
        node_config: of the SuperNode.
        run_delta: δ of the run, used where the node declares no limit of its own.
        public: what the run config declares for simulated clients; a node's own word wins.

    Raises:
        ConfigError: if a limit is not a number greater than 0 or comes without its δ, or if
            public-size is no boolean.
    """
    limit = _number(node_config, "max-epsilon", math.inf)
    delta = _number(node_config, "delta", run_delta)
    if not limit > 0:
        raise ConfigError(f"node config max-epsilon={limit} must be greater than 0")
    if not 0 < delta < 1:
        raise ConfigError(f"node config delta={delta} must be in (0, 1)")
    if math.isfinite(limit) and "delta" not in node_config:
        raise ConfigError(f"node config max-epsilon={limit} needs a delta beside it")
    declared = node_config.get("public-size", public)
    if not isinstance(declared, bool):
        raise ConfigError(f"node config public-size={declared!r} must be true or false")
    return Policy(Limit(limit, delta), declared)


def state_folder(node_config: Mapping[str, object]) -> Path:
    """Return where this client keeps its ledger: ``state-path``, else $LALORA_HOME, ~/.lalora."""
    default = os.environ.get("LALORA_HOME", "~/.lalora")
    return full_path(str(node_config.get("state-path", default)))
