"""Which LoRA factors take a local step, and which travel: pure functions of (round t, step k).

Rounds ``t`` count from 1 and are successful aggregations on the server; steps ``k`` count from 0
and restart in every round. B comes first everywhere: B starts at zero, so the gradient of A,
``s·Bᵀ·G``, is zero and a first private step on A would be pure noise (arXiv:2602.19926, Alg. 1).
"""

from collections.abc import Callable

from lalora_app.adapter.factors import AB, A, B, Factors

PERIOD = 2  # steps after which every schedule begins again
TrainSchedule = Callable[[int, int], Factors]
SyncSchedule = Callable[[int], Factors]


def both(t: int, k: int = 0) -> Factors:
    """Train or send both factors, always (FedIT, DP-LoRA)."""
    return AB


def only_b(t: int, k: int = 0) -> Factors:
    """Train or send B, always; A stays at its common initial value (FFA-LoRA)."""
    return B


def only_a(t: int, k: int = 0) -> Factors:
    """Train or send A, always (FedSA-LoRA sends it)."""
    return A


def alternate_rounds(t: int, k: int = 0) -> Factors:
    """Train or send B in odd rounds and A in even rounds (RoLoRA)."""
    return B if t % 2 == 1 else A


def alternate_steps(t: int, k: int) -> Factors:
    """Train B in even steps and A in odd steps of every round (LA-LoRA)."""
    return B if k % 2 == 0 else A


def factors_trained_in(trains: TrainSchedule, t: int, local_steps: int) -> Factors:
    """Return the factors that round ``t`` trains: the union of ``trains(t, k)`` over its steps."""
    return frozenset().union(*(trains(t, k) for k in range(min(local_steps, PERIOD))))
