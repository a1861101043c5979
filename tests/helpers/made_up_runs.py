"""Made-up results of runs, and the words of a figure."""

import math
import random
from xml.etree import ElementTree

from conftest import defaults
from lalora_app.reports.tables import (
    METRICS,
)
from lalora_app.results.finished_run import Record

BALANCED, PERPLEXITY = METRICS[1:3]
LABELS = ("la-lora", "rolora", "dp-lora")


def a_row(t, score, epsilon, *, failed=(), error=None, second="balanced_accuracy", rounds=4):
    return {
        "attempt": t,
        "round": t,
        "phase": "A+B",
        "aggregated": t not in failed,
        "replies": 4,
        "dropped": [],
        "upload_bytes": 150_536,
        "download_bytes": 297_992,
        "epsilon_max": epsilon * (rounds + t) / (2 * rounds),
        "seconds": 1.5,
        "accuracy": score,
        second: 0.9 * score if second == "balanced_accuracy" else 10.0 - score,
        "elapsed": 2.0 * t,
        "aggregation_error": error,
    }


def record(
    label="la-lora", epsilon=3.0, seed=0, rounds=4, config=None, partition=None, **row
) -> Record:
    """A run whose scores are a pure function of its label, ε and seed."""
    chance = random.Random(f"{label} {epsilon} {seed}")
    scores = [0.8 + 0.03 * t + 0.02 * chance.random() for t in range(1, rounds + 1)]
    history = [a_row(t, s, epsilon, rounds=rounds, **row) for t, s in enumerate(scores, 1)]
    keys = ("accuracy", "balanced_accuracy", "perplexity", "epsilon_max")
    method = label if label in LABELS else "la-lora"
    return Record(
        label=label,
        method=method,
        epsilon=epsilon,
        seed=seed,
        config=defaults()
        | {"method": method, "privacy.epsilon": epsilon, "seed": seed}
        | (config or {}),
        summary={
            **{"method": method, "rounds": rounds, "delta": 1e-5, "seconds": 10.0 + seed},
            **{key: history[-1][key] for key in keys if key in history[-1]},
            **{"upload_bytes_per_round": 150_536, "download_bytes_per_round": 297_992},
            "status": "completed",
        },
        history=history,
        partition=partition,
        privacy={"unit": "one example", "accountant": "PRV"},
        clients=None if partition is None else len(partition["clients"]),
    )


def study(epsilons=(1.0, math.inf), seeds=range(3), **changes) -> list[Record]:
    return [record(m, e, s, **changes) for m in LABELS for e in epsilons for s in seeds]


def words(panel: str) -> list[str]:
    found = ElementTree.fromstring(panel).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()).strip() for text in found]
