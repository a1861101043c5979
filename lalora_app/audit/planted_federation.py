"""A whole federation in this process, with mislabelled examples planted at one client.

The trainer, the server rule and the files of resident factors are the app's own; only the network
is left out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lalora_app.adapter.factors import Adapter, Factors, Kind, active_names, kind, select
from lalora_app.adapter.low_rank import add_to_drift
from lalora_app.aggregation.rule import RoundInfo
from lalora_app.aggregation.server_state import ServerState
from lalora_app.client import local_round, resident_factors
from lalora_app.data.encoding import Batch, Encoded, Indices
from lalora_app.data.examples import Examples, split
from lalora_app.data.partition import partition
from lalora_app.methods.compatibility import method_of
from lalora_app.models.backbone import build
from lalora_app.privacy.accounting import Release, calibrate, epsilon
from lalora_app.privacy.ledger import Reservation
from lalora_app.privacy.randomness import seed_of, seeded
from lalora_app.private_step import step
from lalora_app.settings.run_config import Config

_VICTIM = 0


@dataclass(frozen=True)
class Planted(Encoded):
    """A client's examples and the canaries; those that are out are records without content.

    Attributes:
        inner: all of them.
        absent: those that are out.
        drawn: of every batch so far, who was in it, for a check of the attack.
    """

    inner: Encoded
    absent: frozenset[int]
    drawn: list[frozenset[int]] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of records, the empty ones included."""
        return len(self.inner)

    def length(self, index: int) -> int:
        """Return what batches are sorted by."""
        return self.inner.length(index)

    def width(self, index: int) -> int:
        """Return what an example has in common with all of its micro-batch."""
        return self.inner.width(index)

    def batch(self, indices: Indices, width: int = 0) -> Batch:
        """Return the given examples."""
        return self.inner.batch(indices, width)

    def micro_batches(self, indices: Iterable[int], size: int) -> Iterator[Batch]:
        """Yield the given examples but the absent ones, which add nothing to any sum."""
        present = [index for index in indices if index not in self.absent]
        self.drawn.append(frozenset(present))
        yield from self.inner.micro_batches(present, size)


@dataclass(frozen=True)
class Sent:
    """What the victim computed in a round: the change of each of its tensors.

    Attributes:
        t: the round.
        start: the global adapter that it was sent.
        drift: what had moved into the base by then.
        change: of all its tensors against ``start``; those of the kinds in ``kinds`` travelled.
        kinds: that travelled.
        steps: by kind, the run's steps that its change is made of; what waited for its turn has
            those of the rounds before too.
    """

    t: int
    start: Adapter
    drift: Adapter
    change: Adapter
    kinds: frozenset[Kind]
    steps: Mapping[Kind, list[int]]


def mislabelled(config: Config, count: int) -> Examples:
    """Return public test examples with another label than their own, at most ``count``."""
    test = split(config.data)[1]
    test = test.take(range(min(count, len(test))))
    wrong = tuple((label + 1) % config.data.num_labels for label in test.labels)
    return Examples(test.contents, wrong)


@dataclass(frozen=True)
class PlantedSite:
    """A simulated client."""

    data: Planted
    release: Release
    residents: Path


def _joined(own: Examples, more: Examples) -> Examples:
    return Examples(own.contents + more.contents, own.labels + more.labels)


class Federation:
    """The rounds of a run in which every client takes part.

    Args:
        config: of the run.
        canaries: examples for the victim, behind its own.
        members: (canaries,), which of them are in its data.
        clients: their number.
        seed: of batches and noise; the canaries are public, and the result is thrown away.
        folder: of the resident factors.
    """

    def __init__(
        self,
        config: Config,
        canaries: Examples,
        members: np.ndarray,
        clients: int,
        seed: int,
        folder: Path,
    ):
        self.config, self.method, self.seed = config, method_of(config), seed
        self.backbone, start = build(config)
        self.state = ServerState(start)
        self._folder = folder
        parts = partition(config.data, config.seed, clients)
        own = [parts[i] if i != _VICTIM else _joined(parts[i], canaries) for i in range(clients)]
        absent = len(parts[_VICTIM]) + np.flatnonzero(~members)
        self.records = self.backbone.encode(own[_VICTIM])
        self.sites = [
            self._site(i, data, frozenset(absent.tolist()) if i == _VICTIM else frozenset())
            for i, data in enumerate(own)
        ]

    def _site(self, index: int, data: Examples, absent: frozenset[int]) -> PlantedSite:
        privacy, train = self.config.privacy, self.config.train
        rate = train.batch_size / len(data)
        steps = self.config.num_server_rounds * train.local_steps
        noise = calibrate(privacy.epsilon, privacy.delta, sampling_rate=rate, steps=steps)
        planted = Planted(self.backbone.encode(data), absent)
        folder = self._folder / str(index) / "waiting.safetensors"
        return PlantedSite(planted, Release(rate, noise, train.local_steps), folder)

    @property
    def release(self) -> Release:
        """What the victim releases in each round."""
        return self.sites[_VICTIM].release

    @property
    def epsilon(self) -> float:
        """The victim's ε over the whole run, by the accountant."""
        releases = [self.release] * self.config.num_server_rounds
        return epsilon(releases, self.config.privacy.delta)

    def drawn(self, steps: Iterable[int]) -> frozenset[int]:
        """Return which of the victim's records were in the batches of the given steps."""
        batches = self.sites[_VICTIM].data.drawn
        return frozenset().union(*(batches[step] for step in steps))

    def _trained(self, index: int) -> Adapter:
        """Return a client's result of the round under way."""
        site, config, t = self.sites[index], self.config, self.state.round + 1
        versions = self.state.versions
        start = resident_factors.with_residents(site.residents, self.state.adapter, versions, t)
        local = local_round.Local(
            self.method,
            t,
            config.num_server_rounds,
            config.train,
            config.rule,
            config.privacy.clip_norm,
            seed_of(self.seed, index, t),
        )
        streams = step.RandomStreams(
            seeded(self.seed, "audit sampling", index, t),
            seeded(self.seed, "audit noise", index, t),
        )
        result = local_round.run_round(
            self.backbone,
            site.data,
            start,
            self.state.drift,
            local=local,
            reservation=Reservation(site.release),
            streams=streams,
        )
        waiting = self.method.resident(t, config.train.local_steps)
        resident_factors.save_residents(site.residents, result, waiting, versions, t)
        return result

    def rounds(self) -> Iterator[Sent]:
        """Run all rounds; yield what the victim computed in each."""
        for t in range(1, self.config.num_server_rounds + 1):
            before, drift = self.state.adapter, self.state.drift
            results = [self._trained(i) for i in range(len(self.sites))]
            synced = self.method.sent(t, last=self.config.is_last(t))
            self._aggregate(t, [select(result, synced) for result in results], synced)
            result = results[_VICTIM]
            change = {name: result[name] - before[name] for name in result}
            kinds = frozenset(kind(name) for name in select(result, synced))
            steps = {which: self._steps(t, which) for which in {kind(name) for name in result}}
            yield Sent(t, before, drift, change, kinds, steps)

    def _steps(self, t: int, which: Kind) -> list[int]:
        """Return the steps since the start that the server has of a kind of tensor."""
        count, trains = self.config.train.local_steps, self.method.trains
        own = [
            (t - 1) * count + k
            for k in range(count)
            if which in {kind(n) for n in active_names(self.state.adapter, trains(t, k))}
        ]
        waited = t > 1 and which in self.method.resident(t - 1, count)
        return (self._steps(t - 1, which) if waited else []) + own

    def _aggregate(self, t: int, uploads: list[Adapter], synced: Factors) -> None:
        config, state = self.config, self.state
        info = RoundInfo(
            t=t, rounds=config.num_server_rounds, seed=config.seed, numbers=config.rule
        )
        new = self.method.aggregate(state.adapter, [1.0] * len(uploads), uploads, info)
        scale = config.lora.alpha / config.lora.rank
        drift = add_to_drift(state.drift, new.fold, scale) if new.fold else None
        self.state = state.advanced(new.adapter, synced, drift)
