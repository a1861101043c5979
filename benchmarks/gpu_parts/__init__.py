"""The parts of `benchmarks/gpu.py`, from correctness to a study.

In: the settings of `settings.py`. Out: rows, which `part_file.py` writes to one JSON file per part.
Each part is a module with a function `units`, which returns the named pieces of its work.
`gates.py` compares rows with the required values, `tables.py` writes the tables of the docs.
"""
