"""The table of federated LoRA methods and the parts that a method may choose.

In: the `method` key of a run. Out: one `Method`: schedule of factors, filter, optimiser,
parametrisation, server rule. A method cannot change clipping or noise.
"""
