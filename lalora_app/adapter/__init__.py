"""Names, shapes, files and low-rank algebra of the LoRA tensors.

In and out: an `Adapter`, a dict from PEFT's tensor name to a float32 array. No torch model and no
data are needed here.
"""
