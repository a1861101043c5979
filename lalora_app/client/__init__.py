"""One client (site): admission of a run, its private files, and the training of one round.

In: a request of the server, and the site's own configuration. Out: a reply with clipped and noised
tensors, or a fixed sentence in place of an error. `answers.py` answers what needs no model and
passes the rest on to `requests.py`, which reserves the budget in the ledger and trains;
`own_data.py` says how the site's own files are read.
"""
