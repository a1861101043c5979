"""The run's log on the server: evaluation, progress lines, history, summary, privacy report."""

import logging
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from flwr.app import ArrayRecord, MetricRecord

from lalora_app.data.encoding import Encoded
from lalora_app.models.backbone import Backbone
from lalora_app.models.scores import Metrics, format_scores, scores_in_row
from lalora_app.results.run_folder import RunFolder
from lalora_app.server.strategy import FederatedLora
from lalora_app.settings.run_config import Config

_log = logging.getLogger("flwr")
_EVAL_BATCH = 64


@dataclass
class Progress:
    """After every round: evaluates if it is due, tells in a line, writes history and checkpoint.

    Attributes:
        rows: of the history; those of a resumed run are there from the start.
        started: when this session of the run began.
    """

    config: Config
    folder: RunFolder
    strategy: FederatedLora
    model: Backbone
    test: Encoded
    rows: list[dict[str, Any]]
    started: float
    _earlier: float = field(init=False)  # seconds of the sessions before a resume

    def __post_init__(self) -> None:
        self._earlier = self.rows[-1]["elapsed"] if self.rows else 0.0

    def elapsed(self) -> float:
        """Return the seconds of the whole run, without those between its sessions."""
        return self._earlier + time.monotonic() - self.started

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Flower's ``evaluate_fn``: round 0 is the start."""
        scores = self._scores()
        if server_round > 0:
            last = self.strategy.attempts[-1]
            self._record({"attempt": self.strategy.state.attempts, **asdict(last)}, scores)
        return MetricRecord(dict(scores))

    def _scores(self) -> Metrics:
        """Return how good the adapter is; nothing where it is not the round to look."""
        attempts, state = self.strategy.attempts, self.strategy.state
        if not self.config.is_evaluated(state.attempts):
            return {}
        before = scores_in_row(self.rows[-1]) if self.rows else {}
        if before and attempts and not attempts[-1].aggregated:  # the adapter is the same
            return before
        self.model.load(state.adapter, state.drift)
        return self.model.evaluate(self.test.batches(_EVAL_BATCH))

    def _record(self, attempt: dict[str, Any], scores: Metrics) -> None:
        elapsed = self.elapsed()
        self.rows.append({**attempt, **scores, "elapsed": elapsed})
        self.folder.write_history(self.rows)
        self.folder.checkpoint(self.strategy.state)
        total, done = self.config.num_server_rounds, attempt["attempt"]
        left = (elapsed - self._earlier) / len(self.strategy.attempts) * (total - done)
        _log.info(
            "LaLoRA round %d/%d  phase %s  %s  %s  epsilon <= %.2f  %.1f s  ETA %d:%02d",
            *(done, total, attempt["phase"]),
            "aggregated" if attempt["aggregated"] else "FAILED: too few valid replies",
            *(format_scores(scores) or "not evaluated", attempt["epsilon_max"]),
            *(attempt["seconds"], int(left) // 60, int(left) % 60),
        )
