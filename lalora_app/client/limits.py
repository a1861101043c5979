"""The noise of a round and the limits on it: checked before the model is loaded, then reserved.

The first check needs the number of the site's examples. It is in a file that is valid while nothing
changes that decides on reading them, so a refusal reads neither data nor model.
Privacy: the number stays on the site's own disk, where the ledger's sampling rates tell it as well.
"""

import contextlib
import json
from pathlib import Path

from lalora_app.adapter.atomic_files import file_name, replace_atomically
from lalora_app.client.site import Site
from lalora_app.methods.head_rounds import class_sum_releases
from lalora_app.privacy.accounting import Release
from lalora_app.privacy.budget import Limit, noise_for
from lalora_app.privacy.ledger import Limits, Reservation
from lalora_app.privacy.ledger_entries import compositions
from lalora_app.settings.run_config import Config
from lalora_app.shared_noise.run_constants import noise_multiplier
from lalora_app.shared_noise.shares import Cohort
from lalora_app.wire.messages import TrainRequest


def _size_file(site: Site) -> Path:
    name = Path(file_name(site.dataset, site.client))
    return site.state / "sizes" / name.with_suffix(".json")


def remembered_size(site: Site, config: Config) -> int | None:
    """Return the number of the site's own examples; None: it must be read from the data.

    Limit: with an open task it is always read, since all examples decide on whether it takes part.
    """
    if site.task is not None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(_size_file(site).read_text("utf-8"))
        if saved["fingerprint"] == site.fingerprint(config):
            return int(saved["examples"])
    return None


def remember_size(site: Site, config: Config, size: int) -> None:
    """Save the number of the site's own examples, if it is new.

    Limit: for a simulated client, whose data has no file of its own, nothing is saved.
    """
    fingerprint = site.fingerprint(config)
    if fingerprint is None or site.task is not None or remembered_size(site, config) == size:
        return
    with replace_atomically(_size_file(site), mode=0o700) as new:
        new.write_text(json.dumps({"fingerprint": fingerprint, "examples": size}), "utf-8")


def _limits(config: Config, site: Site, planned: int) -> Limits:
    """Return the limits of run and site on ``planned`` releases."""
    privacy, policy = config.privacy, site.policy
    return Limits(
        planned=planned,
        run_limit=Limit(privacy.epsilon, privacy.delta),
        node_limit=policy.limit,
        alone_limit=policy.alone_limit,
        max_rounds=policy.max_rounds,
        per_day=policy.max_rounds_per_day,
        part=site.part(config),
        seeded=privacy.noise == "seeded",
    )


def _planned_class_sums(
    config: Config, site: Site, request: TrainRequest, size: int
) -> tuple[Release, Limits]:
    """Return the release of class sums and its limits, with the steps that are planned after it."""
    privacy, train, policy = config.privacy, config.train, site.policy
    limit = Limit(privacy.epsilon, privacy.delta)
    past = site.ledger.releases(site.dataset, request.run)
    (release,) = class_sum_releases(config, past)
    policy.check_noise(release.noise_multiplier)
    later = []
    if (steps := request.steps_left - train.local_steps) > 0:  # this round takes no step
        q = train.rate(size)
        noise = noise_for([], limit, sampling_rate=q, steps=steps, before=[*past, release])
        policy.check_noise(noise)
        later = [Release(q, noise, steps)]
    return release, {**_limits(config, site, release.count), "later": later}


def _planned_shared(
    config: Config, site: Site, request: TrainRequest, cohort: Cohort
) -> tuple[Release, Limits]:
    """Return the one release of a round with shared noise, whose z is a constant of the run."""
    noise = noise_multiplier(config)
    site.policy.check_noise(noise)
    limits = _limits(config, site, max(request.steps_left, 1))
    release = Release(config.train.sampling_rate, noise, 1)
    return release, {**limits, "alone": cohort.alone(noise)}


def _planned(
    config: Config, site: Site, request: TrainRequest, size: int, cohort: Cohort | None
) -> tuple[Release, Limits]:
    """Choose the noise of a round with ``size`` examples, and return its releases and limits."""
    if config.sums_classes(request.round):
        return _planned_class_sums(config, site, request, size)
    if cohort is not None:
        return _planned_shared(config, site, request, cohort)
    steps, q = config.train.local_steps, config.train.rate(size)
    limit = Limit(config.privacy.epsilon, config.privacy.delta)
    entries = site.ledger.entries(site.dataset, request.run)
    # An honest run has one list; the ledger checks all lists before it counts.
    entries = compositions(entries, site.part(config))[0]
    sums = [entry.release for entry in entries if config.sums_classes(entry.round)]
    past = [entry.release for entry in entries if not config.sums_classes(entry.round)]
    planned = max(request.task_steps_left, steps)
    noise_multiplier = noise_for(past, limit, sampling_rate=q, steps=planned, before=sums)
    site.policy.check_noise(noise_multiplier)
    return Release(q, noise_multiplier, steps), _limits(config, site, planned)


def check_limits(
    config: Config, site: Site, request: TrainRequest, cohort: Cohort | None = None
) -> None:
    """Check a round's limits without data and model, if the number of examples is remembered.

    Args:
        config: the run's config.
        site: this client.
        request: the server's order.
        cohort: the clients that share the noise; None: the noise is the site's own.

    Raises:
        BudgetError: if a limit would be exceeded.
        PolicyError: if the noise would be too small for the site.
    """
    size = remembered_size(site, config)
    if size is not None:
        site.require_size(size, config)
        release, limits = _planned(config, site, request, size, cohort)
        site.ledger.check(site.dataset, request.run, release, **limits)


def reserve(
    config: Config,
    site: Site,
    request: TrainRequest,
    size: int,
    cohort: Cohort | None = None,
    uid: str | None = None,
) -> Reservation:
    """Choose the noise, check the limits, and commit the round's releases to the ledger.

    Args:
        config: the run's config.
        site: this client.
        request: the server's order.
        size: the number of its examples.
        cohort: the clients that share the noise; None: the noise is the site's own.
        uid: a name that no other release may have; None: a random one.

    Raises:
        BudgetError: if a limit would be exceeded, or the name is used; nothing is written then.
        PolicyError: if the noise would be too small for the site; nothing is written then.
    """
    release, limits = _planned(config, site, request, size, cohort)
    order = (site.dataset, request.run, request.round, release)
    return site.ledger.reserve(*order, uid=uid, **limits)
