"""Write and read the files of a run.

In: history, adapter and config of a run. Out: the run folder with history, checkpoints, PEFT
adapter and model card, or a merged model (`merge.py`).
"""
