"""Lines of `lalora check` on a site's limits: the ε spent so far, and a check of the whole run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lalora_app.client.site import Site
from lalora_app.data.task_division import division_of
from lalora_app.methods.head_rounds import class_sum_releases
from lalora_app.privacy.accounting import Release, calibrate, epsilon
from lalora_app.privacy.budget import BudgetError, Limit, check_limit
from lalora_app.privacy.ledger_entries import (
    WHOLE,
    compositions,
    releases_alone,
    releases_of,
    worst_releases,
)
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import Config
from lalora_app.shared_noise.shares import Cohort


def steps_of_task(config: Config, task: int, size: int) -> Release:
    """Return the steps of a client in one task, with their sampling rate and noise.

    The client is assumed to take part in all rounds, of which none fails. Without tasks this is an
    upper limit; a failed round of a task is repeated, and later tasks have fewer.

    Args:
        config: the run's config.
        task: number of the task, from 0.
        size: the number of the client's rows of this task.

    Limit: a run without tasks has one.
    """
    privacy, train, sums = config.privacy, config.train, class_sum_releases(config)
    rounds = range(1 + len(sums), config.num_server_rounds + 1)
    own = sum(config.open_task(t) == task for t in rounds)
    q, steps = train.rate(size), train.local_steps * own
    target, delta = privacy.epsilon, privacy.delta
    return Release(q, calibrate(target, delta, sampling_rate=q, steps=steps, past=sums), steps)


def lines_on_limits(config: Config, site: Site, sizes: Sequence[int]) -> Iterator[str]:
    """Yield one line per limit of a site, after a check that the limit allows the whole run.

    With shared noise there is a second limit, of the ε that holds if a server opens the site's
    uploads. It grows with the number of sites.

    Args:
        config: the run's config.
        site: the site.
        sizes: the number of its rows of each task.

    Raises:
        ConfigError: if the site's ledger and this run together would exceed a limit.
    """
    file, limit = site.state / "ledger.sqlite", site.policy.limit
    entries = site.ledger.entries(site.dataset) if file.is_file() else []
    plans = [steps_of_task(config, task, size) for task, size in enumerate(sizes)]
    for task, plan in enumerate(plans):
        part = division_of(config).part(task) if config.has_tasks else WHOLE
        for lines in compositions(entries, part):
            past = [*releases_of(lines), *class_sum_releases(config)]
            _require("max-epsilon", limit, past, plan)
    spent = epsilon(worst_releases(entries, limit.delta), limit.delta)
    yield f"limit     epsilon {spent:.3g} of {limit.epsilon:g} is spent, by {file}"
    if config.privacy.shared and (alone := site.policy.alone_limit) is not None:
        opened = worst_releases(entries, alone.delta, releases_alone)
        yield _line_on_alone(config, site, alone, opened, plans[0])  # no tasks with shared noise


def _line_on_alone(
    config: Config, site: Site, limit: Limit, past: list[Release], plan: Release
) -> str:
    """Return the line on the limit of ε-alone."""
    cohort = Cohort.of(_sites(config, site), config.privacy.colluding)
    opened = replace(plan, noise_multiplier=cohort.alone(plan.noise_multiplier))
    _require("max-epsilon-alone", limit, past, opened)
    spent, most = epsilon(past, limit.delta), epsilon([opened], limit.delta)
    return (
        f"alone     epsilon-alone {spent:.3g} of {limit.epsilon:g} is spent; with "
        f"{cohort.clients} sites this run alone has {most:.3g}"
    )


def _sites(config: Config, site: Site) -> int:
    """Return the number of sites: those that the policy names, else the run's smallest number."""
    conditions = site.policy.shared_noise
    peers = None if conditions is None else conditions.peers
    return config.min_clients if peers is None else len(peers) + 1


def _require(key: str, limit: Limit, past: list[Release], plan: Release) -> None:
    try:
        check_limit(past, plan, limit, "node", key.removeprefix("max-"))
    except BudgetError as error:
        raise ConfigError(f"{key}={limit.epsilon:g} does not allow this run: {error}") from error
