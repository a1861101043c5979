"""The sessions of the attempts at the server: two waves per attempt, pipelined.

In the first wave of attempt t travels the stage "share" of t + 1, in the second one "advertise" of
t + 2. So attempt t + 1 begins with all shares. An attempt without them begins with two waves more:
the first of a run, and one that follows an attempt in which too many clients dropped out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from lalora_app.secagg.messages import MOST_CLIENTS
from lalora_app.secagg.session import Session
from lalora_app.secagg.waves import Part, exchange
from lalora_app.settings.errors import ConfigError


@dataclass
class Pipeline:
    """The sessions of the present attempt and of the next two.

    Attributes:
        run: name of the run.
        cohorts: node id per client number, for every attempt of the run.
        min_clients: smallest number of clients of an attempt.
        timeout: largest duration of a wave in seconds.
        colluding: c of a run with shared noise; None without it.
        digest: SHA-256 of the run config; empty without shared noise.

    Raises:
        ConfigError: if an attempt has too many clients.
    """

    run: str
    cohorts: Sequence[Mapping[int, int]]
    min_clients: int
    timeout: float
    colluding: int | None = None
    digest: bytes = b""
    _sessions: dict[int, Session] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (most := max(map(len, self.cohorts), default=0)) > MOST_CLIENTS:
            raise ConfigError(
                f'secure-aggregation="secagg+" must have at most {MOST_CLIENTS} clients in a '
                f"round, and there are {most}: each exchanges shares with all others; lower "
                "fraction-train"
            )

    def begin(self, attempt: int, grid: Grid) -> Session:
        """Return an attempt's session, after the two waves that set it up if it has no shares.

        Args:
            attempt: number of the attempt.
            grid: Flower's connection to the clients.
        """
        found = self._sessions.get(attempt)
        if found is None or not found.has_shares():
            self._set_up(attempt, grid)
        self._sessions = {n: s for n, s in self._sessions.items() if n >= attempt}
        return self._sessions[attempt]

    def _set_up(self, attempt: int, grid: Grid) -> None:
        exchange(self._advertise(attempt), attempt, grid, self.timeout)
        if shares := self._share(attempt):
            later = self._advertise(attempt + 1)
            exchange([*shares, *later], attempt, grid, self.timeout)

    def _advertise(self, attempt: int) -> list[Part]:
        """Return the stage "advertise" with new keys; no stage after the last attempt."""
        if attempt > len(self.cohorts):
            return []
        before = self._sessions.get(attempt)
        session = Session(
            self.run,
            attempt,
            self.cohorts[attempt - 1],
            self.min_clients,
            self.colluding,
            self.digest,
        )
        session.drop_reasons.extend(before.drop_reasons if before else [])
        self._sessions[attempt] = session
        return [session.advertise()]

    def _share(self, attempt: int) -> list[Part]:
        """Return the stage "share" if enough clients have sent keys."""
        session = self._sessions.get(attempt)
        return [session.share()] if session and session.has_keys() else []

    def with_training(self, attempt: int) -> list[Part]:
        """Return the stages that travel with the training requests of an attempt."""
        return self._share(attempt + 1)

    def with_unmasking(self, attempt: int) -> list[Part]:
        """Return the stages that travel with the stage "unmask" of an attempt.

        Limit: none if the next attempt has no shares, as it must be set up anew.
        """
        following = self._sessions.get(attempt + 1)
        return self._advertise(attempt + 2) if following and following.has_shares() else []
