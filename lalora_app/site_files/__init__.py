"""Files that a site keeps between two messages of a run, apart from its data and its ledger.

In: tensors of a request or of a reply. Out: the same tensors in a later message. `held_download.py`
keeps what the server need not send again, `last_reply.py` the answer to a request that may come
twice, `resident_factors.py` the factors that never travel. `peer_key.py` holds the site's signing
key over all runs.
"""
