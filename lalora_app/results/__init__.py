"""Write and read the files of a run, and analyse the trained adapter.

In: history, adapter and config of a run. Out: the run folder with history, checkpoints, PEFT
adapter and model card, or a merged model (`merge.py`); spectra, curvature and a diagnosis of the
adapter.
"""
