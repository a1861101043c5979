"""Build the frozen base model with its LoRA layers, and evaluate it.

In: the run's `Config`. Out: a `Backbone`, which computes one loss per example, and the initial
adapter.
"""
