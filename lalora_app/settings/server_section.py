"""The table ``server`` of the run config: the optimiser of the mean update, and the average."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lalora_app.settings.names import NONE
from lalora_app.settings.value_rules import law, one_of, positive

_AVERAGE = re.compile(r"(ema|tail):([01]|[01]\.[0-9]{1,9})")


def _is_average(text: str) -> bool:
    found = _AVERAGE.fullmatch(text)
    if found is None:
        return text == NONE
    number = Fraction(found[2])
    return number < 1 if found[1] == "ema" else 0 < number <= 1


def average(*, meaning: str) -> Any:
    """Declare "none", an exponential average, or the share of a uniform average."""
    return law(
        'must be "none", "ema:D" with a decay D in [0, 1), or "tail:F" with a share F in (0, 1]',
        _is_average,
        meaning=meaning,
    )


@dataclass(frozen=True, kw_only=True)
class Server:
    """What the server does with the mean of a round; it reads noised values only."""

    optimizer: str = one_of(
        "sgd",
        "momentum",
        "adam",
        "yogi",
        meaning="Optimiser of the clients' mean update; `sgd` with `server.lr` 1 takes the mean "
        "itself ([methods](methods.md#the-servers-optimiser-and-average)).",
    )
    lr: float = positive(
        meaning="Learning rate of `server.optimizer`; `adam` and `yogi` move an entry by about "
        "this number per round where its updates are far above 0.001, and need a rate below 1, as "
        "0.01 is."
    )
    momentum: float = law(
        "must be in [0, 1)",
        lambda v: 0 <= v < 1,
        meaning="Decay of the first moment of `momentum`, `adam` and `yogi`; no effect on `sgd`.",
    )
    average: str = average(
        meaning="Average of the rounds' adapters that is evaluated and saved; training continues "
        "without it. `ema:0.9` is exponential with decay 0.9, `tail:0.5` is the mean of the last "
        "half of the rounds."
    )

    @property
    def changes_update(self) -> bool:
        """Whether the server's step differs from the mean update itself."""
        return self.optimizer != "sgd" or self.lr != 1.0

    @property
    def averaging(self) -> tuple[str, Fraction] | None:
        """The kind of the average, "ema" or "tail", and its number; None for no average."""
        found = _AVERAGE.fullmatch(self.average)
        return (found[1], Fraction(found[2])) if found else None
