"""Server rules: turn the uploads of one round into the next global adapter.

In: the current adapter, the clients' uploads and their weights. Out: `Aggregated`, the new adapter
and, for some methods, a product to add to the frozen base weights. A new server rule is one
function of type `rule.ServerRule` in a module of this folder; name it in `methods/table.py`.
"""
