"""Balanced participation: which clients a round asks, for a whole run at once."""

import numpy as np

from lalora_app.privacy.randomness import seeded


def plan(clients: int, per_round: int, rounds: int, seed: int) -> list[tuple[int, ...]]:
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
