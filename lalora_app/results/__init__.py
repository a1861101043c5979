"""Files that a run leaves, how they are opened again, and analyses of the trained adapter.

In: history, adapter and config of a run. Out: the run's folder with history, checkpoints, PEFT
adapter and model card.
"""
