"""Noise that the clients of a round share: each adds a part, and the sum carries it once.

In: public constants of a run, a client's clipped gradient sum, and secret seeds. Out: integers with
a share of the noise for secure aggregation, and the decoded mean. No messages: the protocol is
elsewhere. `shares.py` says how much noise each client adds, `seeded.py` draws it, `lattice.py`
chooses the integers, `rounding.py` bounds what rounding costs, `run_constants.py` takes the public
constants from a run's config.
"""
