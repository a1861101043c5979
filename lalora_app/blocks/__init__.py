"""The stack of equal blocks of a model: LoRA on the last ones, and a cache of what is below them.

In: a model and its forward pass. Out: its `Stack`; a PEFT model whose config names exactly the
adapted layers; and encoded examples with kept hidden states, from which a pass can start.
"""
