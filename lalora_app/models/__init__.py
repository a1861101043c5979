"""Build the frozen backbone with its LoRA layers, and evaluate it.

In: the run's `Config`. Out: a `Backbone` that gives one loss per example, and the initial adapter.
"""
