"""The stack of equal blocks of a model, such as the layers of BERT, and LoRA on some of them.

In: a model and one forward pass on random inputs. Out: its `Stack`, and a PEFT model whose config
names exactly the adapted layers.
"""
