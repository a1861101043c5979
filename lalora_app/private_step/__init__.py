"""Turn the gradients of single examples into one clipped and noised sum.

In: a model that gives one loss per example, and a client's encoded examples. Out: `NoisedGrads`,
the only form in which gradients leave this folder. Clipping and noise are in `mechanism.py`.
"""
