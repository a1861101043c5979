"""The server of one run: find the clients, run the rounds, aggregate, write the results.

In: Flower's grid (the connection to the clients), the checked config, the backbone. Out: the
aggregated adapter in the run folder. `strategy.py` accepts or drops each reply (with the checks of
`wire/messages.py`) and calls the server rule.
"""
