"""Simulated clients in worker processes: messages in, replies out, in place of a SuperLink.

In: the messages of the ServerApp. Out: the replies of the ClientApp. `local_grid.py` is the Grid of
the ServerApp, `worker_pool.py` starts the processes and gives them messages, `worker.py` runs in
each of them, `flower_names.py` holds the private names of Flower.
"""
