"""The server of one run: find the clients, run the rounds, aggregate, write the results.

In: Flower's grid, the checked config, the backbone. Out: the aggregated adapter in the run's
folder.
"""
