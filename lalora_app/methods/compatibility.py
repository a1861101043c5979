"""Look up a method, and refuse settings that do not go with it or with secure aggregation."""

import json
from dataclasses import replace

from lalora_app.aggregation import task_blocks
from lalora_app.methods import alignment, filters, optimizers, schedule
from lalora_app.methods.head_rounds import after_head_rounds
from lalora_app.methods.method import Method
from lalora_app.methods.table import METHODS
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import suggestion
from lalora_app.settings.run_config import Config, Scalar, flatten

# Published methods without an example-level guarantee: refused by name, with the reason.
REFUSED = {
    "deer-published": "its noise is not isotropic but its clip is, so the sensitivity is wrong; "
    'method="deer" clips in the geometry of the noise',
    "galore-raw-gradient": "it releases a projector of a raw gradient without noise; "
    'method="galore-dwa" computes it from noised updates',
    "fedsa-raw-state": "a factor or head that a client trains without noise affects its later "
    'uploads; method="fedsa-lora" adds noise to it too',
    "la-lora-published": "it clips batch means, at a median of the private batch; "
    'method="la-lora-full" clips the gradient of every example at a constant',
    "fedsmooth-lora": "it starts from a raw gradient and keeps a raw residual, both without noise",
    "ilora": "its control variates are computed from raw gradients, without noise",
    "losa-private": "its masks and ranks are computed from private activations, without noise",
}


# The only values of these keys that a run with one client can have.
CENTRAL: dict[str, Scalar] = {
    "min-clients": 1,
    "min-replies": 1,
    "weighting": "uniform",
    "robust": "none",
    "suspects": 0,
    "secure-aggregation": "none",
    "lora.ranks": "none",
}


def check_central(config: Config) -> None:
    """Check that a ``central`` run asks for one client only.

    Raises:
        ConfigError: naming the first key with another value than in :data:`CENTRAL`.
    """
    values = flatten(config)
    for key, only in CENTRAL.items():
        if config.central and values[key] != only:
            raise ConfigError(
                f"{key}={json.dumps(values[key])} must be {json.dumps(only)} for central=true: one "
                "client trains alone"
            )


def check_secure_aggregation(config: Config, *, linear: bool) -> None:
    """Check that the run's server needs only the sum of the uploads.

    Args:
        config: the run's config.
        linear: whether the server rule of the method needs only sums.

    Raises:
        ConfigError: naming the key, its value and the reason.
    """
    chosen = config.secure_aggregation
    if chosen == "none":
        return
    here = f'secure-aggregation="{chosen}"'
    if not linear:
        raise ConfigError(
            f'{here} must be "none" for method {config.method}, whose server rule needs each '
            "client's factors"
        )
    if config.robust != "none":
        raise ConfigError(
            f'robust="{config.robust}" must be "none" for {here}: it compares uploads, and the '
            "server sees only their sum"
        )
    if config.weighting != "uniform":
        raise ConfigError(
            f'weighting="{config.weighting}" must be "uniform" for {here}: masks cancel in a '
            "plain sum only"
        )
    if config.min_replies < 2:
        raise ConfigError(
            f"min-replies={config.min_replies} must be at least 2 for {here}: a sum of one upload "
            "is that upload"
        )


def _no_step_reason(method: Method) -> str | None:
    """Return why the server cannot step along a method's mean update; None if it can."""
    if not method.linear:
        return "whose server rule is not a mean"
    if not method.averages_tensors:
        return "whose server rule changes the coordinates of the factors between rounds"
    if method.finally_syncs:
        return "which sends a factor in the last round only"
    return None


def _no_average_reason(method: Method) -> str | None:
    """Return why the adapters of a method's rounds have no average; None if they have one."""
    if method.effective is not None:
        return "whose product depends on more tensors than A and B"
    if method.moves_base:
        return "which moves part of the product into the frozen weights"
    if method.finally_syncs:
        return "which sends a factor in the last round only"
    return None


def _check_server(config: Config, method: Method) -> None:
    """Check the table ``server`` against a method.

    Raises:
        ConfigError: naming the key, its value and the reason.
    """
    server, step, average = config.server, _no_step_reason(method), _no_average_reason(method)
    for key, value, plain, reason in (
        ("optimizer", server.optimizer, "sgd", step),
        ("lr", server.lr, 1.0, step),
        ("average", server.average, "none", average),
    ):
        if value != plain and reason:
            raise ConfigError(
                f"server.{key}={json.dumps(value)} must be {json.dumps(plain)} for method "
                f"{config.method}, {reason}"
            )


def _check_tasks(config: Config, method: Method) -> None:
    """Check that a method with tasks of its own has those of the data, with rounds and rows each.

    Raises:
        ConfigError: if its number of tasks does not fit.
    """
    if method.aggregate not in (task_blocks.freeze_direction, task_blocks.freeze_subspace):
        return
    tasks, rounds = config.rule.tasks, config.num_server_rounds - config.head_rounds
    if config.has_tasks and tasks != config.data.tasks:
        raise ConfigError(
            f"rule.tasks={tasks} must be data.tasks={config.data.tasks} for method "
            f"{config.method}, which freezes its factors at the end of a task"
        )
    if tasks > rounds:
        raise ConfigError(
            f"rule.tasks={tasks} must be at most {rounds} for method {config.method}: each task "
            "needs a round that trains the factors; rule.tasks=1 is a run with one task"
        )
    if method.aggregate is task_blocks.freeze_subspace and tasks > 1 and config.lora.rank == 1:
        raise ConfigError(
            f"lora.rank=1 must be at least 2 for method {config.method} with rule.tasks={tasks}: "
            "half of the rows of A are for what is new in a task"
        )


def _check_sparsity(config: Config, method: Method) -> None:
    """Check that LoSA can prune layers by as much more and less as its config says.

    Raises:
        ConfigError: if a layer would be pruned by less than nothing, or whole.
    """
    rule = config.rule
    most = min(rule.sparsity, 1 - rule.sparsity)
    if method.calibrates and rule.sparsity_spread > most + 1e-9:  # 1 - 0.9 is below 0.1
        raise ConfigError(
            f"rule.sparsity-spread={rule.sparsity_spread} must be at most {most:g} for "
            f"rule.sparsity={rule.sparsity}: layers are pruned by rule.sparsity ± the spread"
        )


def _require_known(name: str) -> None:
    if name in REFUSED:
        raise ConfigError(f"method={json.dumps(name)} is refused: {REFUSED[name]}")
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigError(
            f"method={json.dumps(name)} must be one of {known}{suggestion(name, METHODS)}"
        )


def _no_gradient_reason(method: Method) -> str | None:
    """Return why one gradient of all clients does not train a method; None if it does."""
    if not method.linear or not method.averages_tensors:
        return "whose server rule is not a mean of tensors"
    if method.finally_syncs:
        return "which sends a factor in the last round only"
    if method.optimizer is not optimizers.configured_optimizer:
        return "which has an optimiser of its own at the client"
    more = method.effective or method.perturb or method.penalty is not filters.no_penalty
    if more or method.align is not alignment.keep_result:
        return "whose local steps are more than a gradient step on A, B and head"
    return None


def one_step(method: Method, name: str) -> Method:
    """Return a method whose clients send one gradient per round, of the factors that travel.

    The server takes the step, after the method's filter of noised gradients.

    Args:
        method: an entry of METHODS.
        name: its name.

    Limit: a method that trains what it sends, as `rolora` and `dp-lora`, is unchanged.

    Raises:
        ConfigError: if the method is more than a filtered gradient step.
    """
    if reason := _no_gradient_reason(method):
        raise ConfigError(
            f'privacy.noise-share="sum" must be "own" for method {name}, {reason}: clients send '
            "sums of gradients, and the server takes the step"
        )
    return replace(method, trains=lambda t, k: method.syncs(t), keeps_client_state=False)


def lookup(name: str, local_steps: int, *, shared: bool = False) -> Method:
    """Return the method called ``name`` after checking that every sent factor is trained.

    Args:
        name: the value of the key ``method``.
        local_steps: the number of local steps per round.
        shared: whether clients share the noise of a sum, so that the method has its form of one
            step.

    Raises:
        ConfigError: if the method is unknown or gives no guarantee, or if its schedule needs more
            local steps.
    """
    _require_known(name)
    method = one_step(METHODS[name], name) if shared else METHODS[name]
    for t in (1, 2):  # the longest period of any schedule
        if not method.syncs(t) <= schedule.factors_trained_in(method.trains, t, local_steps):
            raise ConfigError(
                f"train.local-steps={local_steps} must be at least 2 for method {name}: "
                "a round must train every factor that it sends"
            )
    return method


def method_of(config: Config) -> Method:
    """Return a run's method, behind its rounds of the head alone, after checking the config.

    Raises:
        ConfigError: with the keys, their values and the reason.
    """
    steps, shared, ranks = config.train.local_steps, config.privacy.shared, config.lora.ranks
    method = lookup(config.method, steps, shared=shared)
    if ranks != "none" and not method.heterogeneous:
        able = ", ".join(name for name, entry in METHODS.items() if entry.heterogeneous)
        raise ConfigError(
            f'lora.ranks="{ranks}" must be "none" for method {config.method}, whose factors have '
            f"one rank; these take several: {able}"
        )
    if config.robust != "none" and not method.linear:
        raise ConfigError(
            f'robust="{config.robust}" must be "none" for method {config.method}, whose server '
            "rule is not a mean"
        )
    if method.head_only and config.model.task == "causal-lm":
        raise ConfigError(
            f'model.task="causal-lm" must be a classification for method {config.method}: a '
            "language model has no head of its own to train"
        )
    check_central(config)
    check_secure_aggregation(config, linear=method.linear)
    _check_server(config, method)
    _check_tasks(config, method)
    _check_sparsity(config, method)
    return after_head_rounds(method, config)


def checked_rank(rank: object, config: Config) -> int:
    """Return a client's rank after checking it; server and client both do so.

    Args:
        rank: the rank that a node config or a client's answer names.
        config: the run's config.

    Raises:
        ConfigError: if the rank is above ``lora.rank``, or the method needs one rank for all.
    """
    largest = config.lora.rank
    if type(rank) is not int or not 1 <= rank <= largest:
        raise ConfigError(f"rank={rank!r} must be 1 to lora.rank={largest}")
    if rank != largest and not method_of(config).heterogeneous:
        raise ConfigError(f"rank={rank} must be lora.rank={largest} for method {config.method}")
    return rank
