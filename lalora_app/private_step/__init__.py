"""Turn the gradients of single examples into one clipped and noised mean gradient.

In: a model that gives one loss per example, and a client's encoded examples. Out: `NoisedGrads`,
the only form in which gradients leave this folder. Start at `step.py`, which runs one private
step. Sampling, clipping and noise are in `mechanism.py`. The other modules compute per-example
gradients efficiently.
"""
