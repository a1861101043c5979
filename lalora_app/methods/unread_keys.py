"""Keys of the run config that not every run reads, for a warning about values without effect.

A warning and no refusal: a comparison gives one set of keys to many methods, and its tuning scales
the learning rates of all of them.
"""

from lalora_app.methods import optimizers, schedule
from lalora_app.methods.compatibility import method_of
from lalora_app.methods.method import Method
from lalora_app.settings.names import CLASS_MEANS
from lalora_app.settings.run_config import Config, Scalar, flatten

# The defaults in pyproject.toml, which an installed package does not have at run time.
DEFAULTS: dict[str, Scalar] = {
    "privacy.head-share": 0.3,
    "privacy.colluding": 0,
    "train.union-size": 0,
    "train.optimizer": "sgd",
    "train.momentum": 0.0,
    "train.lr-a": 2.0,
    "train.lr-b": 4.0,
    "train.lr-w": 1.0,
    "rule.period": 1,
    "rule.rank-decay": 1.0,
    "rule.tail-penalty": 0.01,
    "rule.fair-weight": 0.01,
    "rule.residual-rank": 0,
    "rule.flat-radius": 0.05,
    "rule.lr-ratio": 2.0,
    "rule.filter-order": 1,
    "rule.global-pull": 0.5,
    "rule.lr-gate": 0.01,
    "rule.gate-temperature": 0.5,
    "rule.tasks": 2,
    "rule.task-rank-decay": 1.0,
    "rule.merge-tolerance": 0.0,
    "rule.sparsity": 0.1,
    "rule.sparsity-steps": 1,
    "rule.sparsity-spread": 0.0,
    "server.momentum": 0.9,
}
# Read by all methods that train factors.
LORA_DEFAULTS: dict[str, Scalar] = {"lora.rank": 8, "lora.alpha": 16.0, "lora.kernel": "fused"}
_READERS = {
    "rule.period": {"rac-lora", "rac-lora-a", "fedsvd", "beamlora"},
    "rule.rank-decay": {"hetlora"},
    "rule.fair-weight": {"lora-fair", "lora-fair-cosine"},
    "rule.residual-rank": {"fedex-lora"},
    "rule.flat-radius": {"flat-lora"},
    "rule.lr-ratio": {"lora-plus"},
    "rule.filter-order": {"doppler"},
    "rule.global-pull": {"dp-fedadamw-full"},
    "rule.lr-gate": {"beamlora", "sd-lora"},
    "rule.gate-temperature": {"beamlora"},
    "rule.tasks": {"sd-lora", "duallora"},
    "rule.task-rank-decay": {"sd-lora"},
    "rule.merge-tolerance": {"sd-lora"},
    "rule.sparsity": {"losa"},
    "rule.sparsity-steps": {"losa"},
    "rule.sparsity-spread": {"losa"},
}
_CONFIGURED = (optimizers.configured_optimizer, optimizers.lora_plus)


def _train_keys(method: Method, config: Config) -> set[str]:
    """Return the keys of the table ``train`` among :data:`DEFAULTS` that a method reads."""
    first, steps = config.head_rounds, config.train.local_steps
    rounds = (schedule.factors_trained_in(method.trains, first + t, steps) for t in (1, 2))
    trained = frozenset[str]().union(*rounds)
    keys = {f"train.lr-{factor.lower()}" for factor in trained}
    if method.optimizer in _CONFIGURED:
        keys |= {"train.optimizer", "train.momentum"}
    if method.optimizer is optimizers.lora_plus:
        keys -= {"train.lr-b"}  # it is rule.lr-ratio times train.lr-a
    return keys


def unread_keys(config: Config) -> list[str]:
    """Return ``key=value`` of all values without effect under the run's method and optimisers.

    A value that equals its default is never listed, whether it was given or not.

    Args:
        config: the run's config.

    Raises:
        ConfigError: if the method and the config do not go together.
    """
    read = _train_keys(method_of(config), config)
    read |= {"privacy.head-share"} if config.model.head == CLASS_MEANS else set()
    read |= {"privacy.colluding", "train.union-size"} if config.privacy.shared else set()
    read |= {key for key, methods in _READERS.items() if config.method in methods}
    shrinks = config.method == "hetlora" and config.rule.rank_decay < 1
    read |= {"rule.tail-penalty"} if shrinks else set()
    read |= set() if method_of(config).whole else set(LORA_DEFAULTS)
    read |= {"server.momentum"} if config.server.optimizer != "sgd" else set()
    values = flatten(config)
    return [
        f"{key}={values[key]!r}"
        for key, default in (DEFAULTS | LORA_DEFAULTS).items()
        if key not in read and values[key] != default
    ]
