"""Names, kinds, ranks, files and low-rank algebra of the LoRA tensors.

In and out: an `Adapter`, a dict from PEFT's tensor name to a float32 array. This folder needs no
model and no training data.
"""
