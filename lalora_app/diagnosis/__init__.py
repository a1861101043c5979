"""Analyse finished runs: what training has done to the weights of the base model.

In: folders of runs, and a public second task. Out: intruder dimensions, matrices of similarity,
sharpness, and what the base model has forgotten.
"""
