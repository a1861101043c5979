"""Server rules: turn the uploads of one round into the next global adapter.

In: the current adapter, the clients' uploads and their weights. Out: `Aggregated`: the new adapter,
and the product that moves into the frozen base, if the method moves it.
"""
