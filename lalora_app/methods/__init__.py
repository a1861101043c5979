"""The table of federated LoRA methods, and the functions that a method is composed of.

In: the `method` key of a run. Out: one `Method`, a record of functions: schedule of the factors,
gradient filter, optimiser, parametrisation, server rule. A method cannot change clipping or noise.
"""
