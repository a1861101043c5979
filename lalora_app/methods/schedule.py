"""Schedules: the factors that a local step trains and the factors that a round uploads.

A schedule is a pure function of (round t, step k). Rounds ``t`` count successful aggregations,
from 1; steps ``k`` count from 0 within every round. Every schedule trains B first if B is zero at
the start: then A's gradient ``s·Bᵀ·G`` is zero and a private step on A would add noise only
(arXiv:2602.19926, Alg. 1). The head trains and travels in every schedule.
"""

from collections.abc import Callable

from lalora_app.adapter.factors import AB, NONE, A, B, Factors, W

PERIOD = 2  # the longest period of a schedule, in local steps
TrainSchedule = Callable[[int, int], Factors]
SyncSchedule = Callable[[int], Factors]


def both(t: int, k: int = 0) -> Factors:
    """Train or upload both factors in every step and round (FedIT, DP-LoRA)."""
    return AB


def only_b(t: int, k: int = 0) -> Factors:
    """Train or upload B only; A keeps its initial value, equal on all clients (FFA-LoRA)."""
    return B


def only_a(t: int, k: int = 0) -> Factors:
    """Train or upload A only (FedSA-LoRA uploads A; the mirrored chain of RAC-LoRA trains it)."""
    return A


def nothing(t: int, k: int = 0) -> Factors:
    """Train or upload no factor: only the head."""
    return NONE


def whole_weights(t: int, k: int = 0) -> Factors:
    """Train or upload the change of the whole weights, in place of factors."""
    return W


def alternate_rounds(t: int, k: int = 0) -> Factors:
    """Train or upload B in odd rounds and A in even rounds (RoLoRA)."""
    return B if t % 2 == 1 else A


def alternate_steps(t: int, k: int) -> Factors:
    """Train B in even steps and A in odd steps of every round (LA-LoRA)."""
    return B if k % 2 == 0 else A


def factors_trained_in(trains: TrainSchedule, t: int, local_steps: int) -> Factors:
    """Return the factors that round ``t`` trains: the union of ``trains(t, k)`` over steps k."""
    return frozenset().union(*(trains(t, k) for k in range(min(local_steps, PERIOD))))
