"""Read examples, encode them for a model, and partition them among simulated clients.

In: the name of a dataset, a file or a folder. Out: the encoded examples of one client, or a
`DataError` that names the config key. `delimited.py` reads text files, `pixels.py` image files,
`labels.py` numbers the classes.
"""
