"""After each round: evaluation on the test split, history, checkpoint and a line of progress."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flwr.app import ArrayRecord, MetricRecord

from lalora_app.data.encoding import Encoded
from lalora_app.models.backbone import Backbone
from lalora_app.models.scores import Metrics, format_scores, scores_in_row
from lalora_app.results.run_folder import RunFolder
from lalora_app.server.initial_state import pruned_state, pruning_step, sparsity_at
from lalora_app.server.log_lines import AGGREGATED, START, TOO_FEW, RoundLine
from lalora_app.server.strategy import FederatedLora
from lalora_app.server_state.iterate_average import final_adapter
from lalora_app.server_state.task_accuracy import KEY, matrix_of
from lalora_app.settings.run_config import Config

_log = logging.getLogger("flwr")
_EVAL_BATCH = 64


@dataclass
class AfterRound:
    """Evaluates after a round if it is due, logs one line, writes history and checkpoint.

    A session is one process of the run; each resume begins another one.

    Attributes:
        config: checked config of the run.
        folder: folder of the results.
        strategy: strategy whose state and attempts are recorded.
        model: backbone that evaluates the adapter.
        test: encoded public test split.
        rows: history so far, one row per attempt; includes the sessions before a resume.
        started: start of this session on the monotonic clock, in seconds.
        tasks: encoded public test examples of each task; empty: the run has no tasks.
    """

    config: Config
    folder: RunFolder
    strategy: FederatedLora
    model: Backbone
    test: Encoded
    rows: list[dict[str, Any]]
    started: float
    tasks: Sequence[Encoded] = ()
    _earlier: float = field(init=False)  # seconds of the sessions before a resume
    _first_round: float = field(init=False)  # start of this session's first round

    def __post_init__(self) -> None:
        self._earlier = self.rows[-1]["elapsed"] if self.rows else 0.0
        self._first_round = self.started

    def elapsed(self) -> float:
        """Return the seconds of all sessions of the run, without the breaks between them."""
        return self._earlier + time.monotonic() - self.started

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Evaluate and record; Flower's ``evaluate_fn``, called with round 0 before the first."""
        self._prune()
        scores = self._scores()
        if server_round > 0:
            last = self.strategy.attempts[-1]
            self._record({"attempt": self.strategy.state.attempts, **asdict(last)}, scores)
        else:
            self._first_round = time.monotonic()
            self._log_line(START, scores, self.strategy.epsilon_before)
        return MetricRecord(dict(scores))

    def _prune(self) -> None:
        """Take LoSA's next step of pruning, if one follows this round."""
        strategy, config = self.strategy, self.config
        if not strategy.method.calibrates or not strategy.attempts:
            return
        step = pruning_step(strategy.state.round, config)
        if step is not None and strategy.attempts[-1].aggregated:
            strategy.state = pruned_state(config, self.model, self.test, strategy.state, step)
            share = sparsity_at(step, config.rule)
            _log.info("LaLoRA pruned %.1f %% of the input features", 100 * share)

    def _scores(self) -> Metrics:
        """Return the scores of the adapter that would be saved now; empty if none are due."""
        attempts, state = self.strategy.attempts, self.strategy.state
        if not self.config.is_evaluated(state.attempts):
            return {}
        before = scores_in_row(self.rows[-1]) if self.rows else {}
        if before and attempts and not attempts[-1].aggregated:  # the adapter is the same
            return before
        self.model.load(final_adapter(state), state.drift)
        return self.model.evaluate(self.test.batches(_EVAL_BATCH))

    def _task_scores(self) -> dict[str, list[float]]:
        """Return the accuracy on each task so far, at the end of a task or of the run."""
        config, state = self.config, self.strategy.state
        if not self.tasks or not state.round:
            return {}
        ended = config.rounds_of_task(state.round) == 1 or config.is_last(state.attempts)
        told = len(matrix_of(self.rows)) > config.open_task(state.round)
        if told or not ended:
            return {}
        self.model.load(final_adapter(state), state.drift)
        seen = self.tasks[: config.open_task(state.round) + 1]
        found = [self.model.evaluate(test.batches(_EVAL_BATCH))["accuracy"] for test in seen]
        shown = " ".join(f"{accuracy:.4f}" for accuracy in found)
        _log.info("LaLoRA task %d of %d ends: %s", len(seen), len(self.tasks), shown)
        return {KEY: found}

    def _record(self, attempt: dict[str, Any], scores: Metrics) -> None:
        """Add the attempt to the history, save the checkpoint and log the round."""
        found = {**attempt, **self._of_some_runs(attempt["round"]), **scores}
        row = {**found, **self._task_scores(), "elapsed": self.elapsed()}
        self.rows.append(row)
        self.folder.write_history(self.rows)
        self.folder.checkpoint(self.strategy.state)
        success = AGGREGATED if attempt["aggregated"] else TOO_FEW
        outcome = f"phase {attempt['phase']}  {success}"
        self._log_line(outcome, scores, attempt["epsilon_max"], attempt["seconds"])

    def _of_some_runs(self, t: int) -> dict[str, Any]:
        """Return the keys of a row that only runs with tasks, or with ranks that shrink, have."""
        found: dict[str, Any] = {}
        if self.config.has_tasks:
            found["task"] = self.config.open_task(t) + 1
        if self.strategy.method.next_rank is not None:
            ranks = self.strategy.state.ranks
            found["lowered_ranks"] = {str(client): ranks[client] for client in sorted(ranks)}
        return found

    def _log_line(
        self, outcome: str, scores: Metrics, epsilon: float, seconds: float = 0.0
    ) -> None:
        done, total = self.strategy.state.attempts, self.config.num_server_rounds
        line = RoundLine(
            done=done,
            total=total,
            outcome=outcome,
            scores=format_scores(scores) or "not evaluated",
            epsilon=epsilon,
            seconds=seconds,
            seconds_left=self._seconds_left(total - done),
        )
        _log.info("LaLoRA %s", line.text())

    def _seconds_left(self, rounds: int) -> int:
        """Return the mean duration of this session's rounds times the rounds left."""
        session = time.monotonic() - self._first_round
        return round(session / max(1, len(self.strategy.attempts)) * rounds)
