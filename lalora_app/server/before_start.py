"""Checks of a simulated run before Flower starts, the cheap ones first.

The same rules hold in the run itself; here they are reported by the command that launches it. Each
check imports the libraries that it needs, which takes seconds: the check of the data does without
transformers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lalora_app.data.examples import Examples, check_client, split
from lalora_app.data.partition import clients_data
from lalora_app.data.task_division import of_task, with_names
from lalora_app.results.run_folder import check_writable
from lalora_app.server.cohorts import planned_cohorts
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import CLASS_MEANS
from lalora_app.settings.run_config import Config, clients_per_round
from lalora_app.shared_noise.shares import Cohort

if TYPE_CHECKING:
    from lalora_app.models.backbone import Backbone

_ANY_NUMBER = 2  # of classes, while the data is not read yet; no check depends on it


@dataclass(frozen=True)
class CheckedData:
    """The data of a run that can start.

    Attributes:
        config: its config, with the classes named.
        train: its training examples, all clients together.
        test: its public test examples.
        task_sizes: (clients, tasks), the number of training examples of each simulated client and
            task; one task in a run without tasks.
    """

    config: Config
    train: Examples
    test: Examples
    task_sizes: list[list[int]]

    @property
    def sizes(self) -> list[int]:
        """The number of training examples of each simulated client."""
        return [sum(of_client) for of_client in self.task_sizes]


def check_clients(config: Config, clients: int) -> None:
    """Check the number of clients of a simulation.

    Raises:
        ConfigError: if ``min-clients`` or ``min-replies`` asks for more clients than there are, or
            a ``central`` run has several.
    """
    if config.central and clients != 1:
        raise ConfigError(f"central=true must be false for --nodes {clients}: one client trains")
    if config.min_clients > clients:
        raise ConfigError(
            f"min-clients={config.min_clients} must be at most the number of simulated clients, "
            f"--nodes {clients}"
        )
    per_round = clients_per_round(config.fraction_train, clients)
    if config.min_replies > per_round:
        raise ConfigError(
            f"min-replies={config.min_replies} must be at most {per_round}, the clients per round "
            f"with fraction-train={config.fraction_train} and --nodes {clients}"
        )


def check_head_share(config: Config) -> None:
    """Check that noise exists with which class sums keep to their share of ``privacy.epsilon``.

    Raises:
        ConfigError: with the smallest possible share.
    """
    from lalora_app.privacy.accounting import smallest_epsilon

    privacy = config.privacy
    if config.model.head != CLASS_MEANS:
        return
    smallest = smallest_epsilon(privacy.delta, sampling_rate=1.0, steps=1) / privacy.epsilon
    if privacy.head_share < smallest:
        raise ConfigError(
            f"privacy.head-share={privacy.head_share} must be at least "
            f"{math.ceil(smallest * 1e4) / 1e4:g}, the smallest share for one release at "
            f"privacy.epsilon={privacy.epsilon} and privacy.delta={privacy.delta:g}"
        )


def task_sizes(config: Config, examples: Examples) -> list[int]:
    """Return the number of a client's examples of each task; of all examples without tasks."""
    return [len(of_task(examples, config, task)) for task in range(config.data.tasks)]


def check_epsilon(config: Config, sizes: Sequence[Sequence[int]]) -> None:
    """Check that noise exists with which every client's releases stay within ``privacy.epsilon``.

    Args:
        config: the run's config.
        sizes: (clients, tasks), the number of examples of each client and task.

    Raises:
        ConfigError: with the smallest possible ε of the run.

    Privacy: the error tells a client's sampling rate; that of a site's own data must be shown at
    that site only.
    """
    from lalora_app.methods.head_rounds import class_sum_releases
    from lalora_app.privacy.accounting import smallest_epsilon

    privacy, train = config.privacy, config.train
    if math.isinf(privacy.epsilon):
        return
    check_head_share(config)
    rounds = Counter(
        (client, config.open_task(t))
        for t, cohort in enumerate(planned_cohorts(config, len(sizes)), start=1)
        if not config.sums_classes(t)  # a round without steps
        for client in cohort
    )
    sums = class_sum_releases(config)
    largest: dict[int, float] = {}  # steps -> largest sampling rate; ε grows with both
    for (client, task), count in rounds.items():
        steps, q = count * train.local_steps, train.rate(sizes[client][task])
        largest[steps] = max(largest.get(steps, 0.0), q)
    smallest, q, steps = max(
        (smallest_epsilon(privacy.delta, sampling_rate=q, steps=steps, past=sums), q, steps)
        for steps, q in largest.items()
    )
    if privacy.epsilon < smallest:
        raise ConfigError(
            f"privacy.epsilon={privacy.epsilon} must be at least "
            f"{math.ceil(smallest * 1e4) / 1e4:g}, the smallest possible for {steps} steps with "
            f"sampling rate {q:.3g} at privacy.delta={privacy.delta:g}"
        )


def check_data(config: Config, clients: int) -> CheckedData:
    """Check everything of a simulated run but its model.

    Args:
        config: the parsed config.
        clients: the number of simulated clients.

    Raises:
        ConfigError: naming the key, its value and the law, for the first failed check.
    """
    from lalora_app.methods.compatibility import method_of

    check_clients(config, clients)
    method_of(config)
    check_writable(config.output)
    config = replace(config, data=with_names(config.data))
    train, test = split(config.data)
    parts = clients_data(config, clients)
    if config.privacy.shared:
        Cohort.of(clients, config.privacy.colluding)
    for part in parts:
        check_client(len(part), batch_size=config.train.fewest, delta=config.privacy.delta)
    sizes = [task_sizes(config, part) for part in parts]
    check_epsilon(config, sizes)
    return CheckedData(config, train, test, sizes)


def check_model(config: Config, clients: int) -> "Backbone":
    """Check the device of a run, and its method and model on the CPU.

    Args:
        config: the parsed config.
        clients: the number of simulated clients, which has no effect here.

    Raises:
        ConfigError: if the method, the model, its targets or its device do not fit.
        LayoutError: if the model gives no per-example gradients.
    """
    from lalora_app.models.backbone import build
    from lalora_app.models.device import pick_device

    pick_device(config.model.device)
    data = config.data if config.data.class_names else replace(config.data, num_labels=_ANY_NUMBER)
    on_cpu = replace(config.model, device="cpu", dtype="float32")
    return build(replace(config, model=on_cpu, data=data))[0]
