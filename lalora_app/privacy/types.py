"""Types that mark on which side of the noise a gradient is."""

from typing import NewType

from torch import Tensor

# name -> (examples, *shape): one gradient an example. Sensitive: never leaves the private step.
PerExampleGrads = NewType("PerExampleGrads", dict[str, Tensor])
# name -> (*shape): clipped per example, summed, noised, divided by the expected batch size.
NoisedGrads = NewType("NoisedGrads", dict[str, Tensor])
