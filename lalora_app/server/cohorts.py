"""Balanced participation: the clients selected for each round, planned for the whole run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lalora_app.privacy.randomness import seeded
from lalora_app.settings.run_config import Config, clients_per_round


def plan_cohorts(clients: int, per_round: int, rounds: int, seed: int) -> list[tuple[int, ...]]:
    """Return the cohort of every attempt: the clients selected least often so far, ties at random.

    Each client is selected for ⌊rounds·per_round/clients⌋ rounds or one more, so a client can
    calibrate its noise for the exact number of its own releases. The seed determines the plan.

    Args:
        clients: number N of clients; cohorts hold sorted indices from 0 to N-1.
        per_round: size of a cohort, from 1 to N; with N every client takes part in every round.
        rounds: number of attempts, failed ones included.
        seed: public seed of the run.

    Privacy: no amplification by client sampling is claimed.
    """
    rng = seeded(seed, "cohorts")
    selections = np.zeros(clients, dtype=int)
    cohorts = []
    for _ in range(rounds):
        order = np.lexsort((rng.random(clients), selections))  # fewest first, then at random
        cohort = np.sort(order[:per_round])
        selections[cohort] += 1
        cohorts.append(tuple(int(i) for i in cohort))
    return cohorts


def planned_cohorts(config: Config, clients: int) -> list[tuple[int, ...]]:
    """Return the cohort of every attempt of a run with the given number of clients."""
    per_round = clients_per_round(config.fraction_train, clients)
    return plan_cohorts(clients, per_round, config.num_server_rounds, config.seed)


@dataclass(frozen=True)
class Clients:
    """The clients of a run and the cohorts planned for them.

    Attributes:
        nodes: Flower's node ids, in the order of the clients' names.
        cohorts: selected clients as indices into ``nodes``, one tuple per attempt.
        simulated: whether the clients are partitions of a dataset that the server has too.
        ranks: LoRA ranks of the clients, in the same order; empty if all have ``lora.rank``.
        model: SHA-256 of each part of the base model, equal on the server and all clients.
    """

    nodes: Sequence[int]
    cohorts: Sequence[tuple[int, ...]]
    simulated: bool = False
    ranks: Sequence[int] = ()
    model: Mapping[str, str] = field(default_factory=dict)

    def rounds_left(self, client: int, attempt: int, within: int | None = None) -> int:
        """Return the number of attempts from ``attempt`` (1, 2, ...) on that select this client.

        Args:
            client: the client's index.
            attempt: the first attempt that counts.
            within: number of attempts that count; None: all until the end of the run.
        """
        end = None if within is None else attempt - 1 + within
        return sum(client in cohort for cohort in self.cohorts[attempt - 1 : end])
