"""Balanced participation: which clients a round asks, for a whole run at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lalora_app.privacy.randomness import seeded
from lalora_app.settings.run_config import Config


def plan_cohorts(clients: int, per_round: int, rounds: int, seed: int) -> list[tuple[int, ...]]:
    """Return the cohort of every attempt: always those who have taken part least, ties at random.

    Each client takes part in ⌊rounds·per_round/clients⌋ or one more rounds, so the releases that
    its noise was calibrated for are never exceeded. The whole plan follows from the seed.

    Args:
        clients: N; cohorts hold indices 0..N-1, sorted.
        per_round: 1..N; N asks everyone, always.
        rounds: attempts, failed ones included.
        seed: public; no privacy amplification is claimed from it.
    """
    rng = seeded(seed, "cohorts")
    taken = np.zeros(clients, dtype=int)
    cohorts = []
    for _ in range(rounds):
        order = np.lexsort((rng.random(clients), taken))  # fewest first, then at random
        cohort = np.sort(order[:per_round])
        taken[cohort] += 1
        cohorts.append(tuple(int(i) for i in cohort))
    return cohorts


def clients_per_round(fraction: float, clients: int) -> int:
    """Return the size of a cohort: ``fraction`` of the clients, at least one."""
    return max(1, round(fraction * clients))


def planned_cohorts(config: Config, clients: int) -> list[tuple[int, ...]]:
    """Return the cohort of every attempt of a run with the given number of clients."""
    per_round = clients_per_round(config.fraction_train, clients)
    return plan_cohorts(clients, per_round, config.num_server_rounds, config.seed)


@dataclass(frozen=True)
class Clients:
    """The clients of a run and the cohorts planned for them.

    Attributes:
        nodes: node id by index; the order is by the clients' own names.
        cohorts: indices into ``nodes``, one tuple an attempt.
        simulated: whether they are the parts of one dataset that the server has too.
        ranks: of the clients, in the same order; none: all have the run's.
        model: the SHA-256 of each part of the base model that they share with the server.
    """

    nodes: Sequence[int]
    cohorts: Sequence[tuple[int, ...]]
    simulated: bool = False
    ranks: Sequence[int] = ()
    model: Mapping[str, str] = field(default_factory=dict)

    def rounds_left(self, client: int, attempt: int) -> int:
        """Return how many of the attempts from ``attempt`` (from 1) on ask this client."""
        return sum(client in cohort for cohort in self.cohorts[attempt - 1 :])
