"""Read examples, encode them for a model, and deal them to simulated clients.

In: the name of a dataset, a file or a folder. Out: encoded examples of one client, or a `DataError`
that names the config key.
"""
