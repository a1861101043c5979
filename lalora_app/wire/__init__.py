"""Messages between server and clients, and the checks of every received message.

In: Flower records. Out: typed requests and replies, or an error. A client's refusal is always one
of the fixed sentences in `refusals.py`, so that error texts reveal no private data. `same_model.py`
compares the base models' hashes.
"""
