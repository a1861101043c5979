"""The client's own limits, from a TOML file or its node config; no server can exceed them."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalora_app.privacy.budget import Limit
from lalora_app.privacy.policy_values import PolicyError as PolicyError
from lalora_app.privacy.policy_values import flag, integer, names, number, require_known
from lalora_app.privacy.shared_policy import SharedNoise, read_shared_noise
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import full_path
from lalora_app.settings.run_config import Config

_INLINE = ("max-epsilon", "delta", "public-size")
_KEYS = (
    *(*_INLINE, "min-noise-multiplier", "max-rounds", "max-rounds-per-day"),
    "max-local-steps",
    *("methods", "models", "datasets", "require-secure-aggregation", "shared-noise"),
)


@dataclass(frozen=True)
class Policy:
    """The limits that a client sets for every run.

    Attributes:
        limit: (ε, δ) of the client's dataset over all runs; ε = inf: only the limit of each run.
        public_size: whether the client's number of examples may be sent.
        min_noise_multiplier: the smallest noise of a release, in clip norms.
        max_rounds: largest number of rounds per run, with repeated ones; None: any number.
        max_rounds_per_day: largest number of rounds in 24 hours; None: any number.
        max_local_steps: largest number of local steps per round; None: any number.
        methods: allowed values of ``method``; None: all.
        models: allowed values of ``model.name``; None: all.
        require_secure_aggregation: whether every upload must be masked.
        shared_noise: conditions for noise that clients share; None: shared noise is refused.
    """

    limit: Limit
    public_size: bool = False
    min_noise_multiplier: float = 0.0
    max_rounds: int | None = None
    max_rounds_per_day: int | None = None
    max_local_steps: int | None = None
    methods: frozenset[str] | None = None
    models: frozenset[str] | None = None
    require_secure_aggregation: bool = False
    shared_noise: SharedNoise | None = None

    @property
    def alone_limit(self) -> Limit | None:
        """The limit of ε-alone, for the ledger; None without conditions for shared noise."""
        return None if self.shared_noise is None else self.shared_noise.limit

    def check_run(self, config: Config) -> None:
        """Check the run's config before its model is loaded.

        Raises:
            PolicyError: with key and value, for the client's own log.
        """
        _require_listed("method", config.method, self.methods)
        _require_listed("model.name", config.model.name, self.models)
        _require_at_most("num-server-rounds", config.num_server_rounds, self.max_rounds)
        _require_at_most("train.local-steps", config.train.local_steps, self.max_local_steps)
        if self.require_secure_aggregation and config.secure_aggregation == "none":
            raise PolicyError('secure-aggregation="none" must be "secagg+"')
        self.check_noise(math.inf if config.privacy.private else 0.0)
        self._check_noise_source(config.privacy.noise)
        if config.privacy.shared:
            self._conditions().check_colluding(config.privacy.colluding)

    def check_cohort(self, honest: int, colluding: int) -> None:
        """Check the numbers of an attempt with shared noise, before the ledger.

        Args:
            honest: the honest shares that are counted on, h.
            colluding: the colluding clients that the attempt withstands, c.

        Raises:
            PolicyError: if the policy has no conditions for shared noise, or they do not hold.
        """
        self._conditions().check_cohort(honest, colluding)

    def _conditions(self) -> SharedNoise:
        if self.shared_noise is None:
            raise PolicyError(
                'privacy.noise-share="sum" must be "own": the policy has no table [shared-noise]'
            )
        return self.shared_noise

    def _check_noise_source(self, noise: str) -> None:
        limits = {"max-epsilon": self.limit, "max-epsilon-alone": self.alone_limit or self.limit}
        for key, limit in limits.items():
            if math.isfinite(limit.epsilon) and noise != "secure":
                raise PolicyError(
                    f'privacy.noise="{noise}" must be "secure" for a node with '
                    f"{key}={limit.epsilon}: the server could repeat it"
                )

    def lines(self) -> list[str]:
        """Return the policy as text, one line per rule."""
        any_of = {"methods": self.methods, "models": self.models}
        masked = self.require_secure_aggregation
        most = {"of one run": self.max_rounds, "in 24 hours": self.max_rounds_per_day}
        return [
            f"epsilon up to {self.limit.epsilon:g} at delta {self.limit.delta:g}, over all runs",
            f"noise of at least {self.min_noise_multiplier:g} clip norms",
            *(f"{_any(n)} rounds {what}" for what, n in most.items()),
            f"{_any(self.max_local_steps)} local steps of a round",
            *(f"{key}: {', '.join(sorted(v)) if v else 'all'}" for key, v in any_of.items()),
            f"the number of examples may {'' if self.public_size else 'not '}be sent",
            f"uploads leave {'under masks only' if masked else 'with or without masks'}",
            *(self.shared_noise.lines() if self.shared_noise else ["noise may not be shared"]),
        ]

    def check_noise(self, noise_multiplier: float) -> None:
        """Check the noise of a round before its releases are on the ledger.

        Raises:
            PolicyError: if the noise is too small.
        """
        if noise_multiplier < self.min_noise_multiplier:
            raise PolicyError(
                f"the noise multiplier would be {noise_multiplier:.4g}, and must be at least "
                f"min-noise-multiplier={self.min_noise_multiplier}"
            )


def _any(most: int | None) -> str:
    return "any number of" if most is None else str(most)


def _require_at_most(key: str, value: int, most: int | None) -> None:
    if most is not None and value > most:
        raise PolicyError(f"{key}={value} must be at most {most}")


def _require_listed(key: str, value: str, allowed: frozenset[str] | None) -> None:
    if allowed is not None and value not in allowed:
        raise PolicyError(f'{key}="{value}" must be one of {", ".join(sorted(allowed))}')


def _limit(values: Mapping[str, object], run_delta: float, source: str) -> Limit:
    limit = number(values, "max-epsilon", math.inf, source)
    delta = number(values, "delta", run_delta, source)
    if not limit > 0:
        raise ConfigError(f"{source} max-epsilon={limit} must be greater than 0")
    if not 0 < delta < 1:
        raise ConfigError(f"{source} delta={delta} must be in (0, 1)")
    if math.isfinite(limit) and "delta" not in values:
        raise ConfigError(f"{source} max-epsilon={limit} needs a delta, at which the limit holds")
    return Limit(limit, delta)


def _tables(path: Path, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{source} must be a readable file: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # wrong encoding, or no TOML
        raise ConfigError(f"{source} must be TOML: {error}") from error


def _of_dataset(tables: Mapping[str, Any], dataset: str, source: str) -> dict[str, Any]:
    """Return the policy's keys for one dataset, with the dataset's own limit if it has one."""
    datasets = tables.get("datasets", {})
    if not isinstance(datasets, dict) or not all(isinstance(t, dict) for t in datasets.values()):
        raise ConfigError(f"{source} datasets must be tables, one per dataset-id")
    for table in datasets.values():
        require_known(table, ("max-epsilon", "delta"), f"{source} datasets:")
        _limit({**tables, **table}, 0.5, source)
    return {**tables, **datasets.get(dataset, {})}


def read_policy_file(path: Path, dataset: str = "") -> Policy:
    """Read a site's policy.

    Args:
        path: the TOML file.
        dataset: the dataset's id; its table under ``datasets`` replaces the common limit.

    Raises:
        ConfigError: with file, key and value, if the file cannot be read or breaks a rule.
    """
    source = f"policy {path}:"
    tables = _tables(path, source)
    require_known(tables, _KEYS, source)
    for key in ("max-epsilon", "delta"):
        if key not in tables:
            raise ConfigError(f"{source} {key} is missing: a policy must set it")
    values = _of_dataset(tables, dataset, source)
    noise = number(values, "min-noise-multiplier", 0.0, source)
    if not 0 <= noise < math.inf:
        raise ConfigError(f"{source} min-noise-multiplier={noise} must be at least 0, and finite")
    limit = _limit(values, 0.5, source)
    return Policy(
        limit,
        flag(values, "public-size", False, source),
        noise,
        integer(values, "max-rounds", 1, source),
        integer(values, "max-rounds-per-day", 1, source),
        integer(values, "max-local-steps", 1, source),
        names(values, "methods", source),
        names(values, "models", source),
        flag(values, "require-secure-aggregation", False, source),
        _shared_noise(values, limit, source),
    )


def _shared_noise(values: Mapping[str, Any], limit: Limit, source: str) -> SharedNoise | None:
    table = values.get("shared-noise")
    return None if table is None else read_shared_noise(table, limit.delta, source)


def read_policy(
    node_config: Mapping[str, object], run_delta: float, public: bool, dataset: str = ""
) -> Policy:
    """Read the policy file that a node config names, or the limits in the node config itself.

    Args:
        node_config: the SuperNode's config: ``policy``, or ``max-epsilon``, ``delta`` and
            ``public-size``.
        run_delta: δ of the run, for nodes without a limit of their own.
        public: the run config's ``public-size``, for simulated clients without their own value; it
            is not used for a node with its own data.
        dataset: the ledger's name of the client's data.

    Raises:
        ConfigError: if a value breaks a rule, or if a node with its own data sets no limit: any
            server could then request all of the data without noise.
    """
    inline = [key for key in _INLINE if key in node_config]
    if "policy" in node_config:
        if inline:
            raise ConfigError(f"node config {inline[0]} must be in the policy file")
        return read_policy_file(full_path(str(node_config["policy"])), dataset)
    if "data-path" in node_config and "max-epsilon" not in node_config:
        raise ConfigError(
            "node config with data-path must have policy, or max-epsilon and delta; "
            "max-epsilon=inf sets no limit over all runs, and each run's own limit holds"
        )
    limit = _limit(node_config, run_delta, "node config")
    # A server must not decide on publishing the size of a site's own data.
    simulated = "data-path" not in node_config
    size = flag(node_config, "public-size", public and simulated, "node config")
    # In simulation nothing is hidden, and nothing need be: shared noise has no conditions there.
    shared = SharedNoise(Limit(math.inf, limit.delta)) if simulated else None
    return Policy(limit, size, shared_noise=shared)
