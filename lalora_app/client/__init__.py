"""One site: admission of a run, its private files, and the training of one round.

In: a request of the server and the site's own configuration. Out: the reply with noised tensors, or
an error that `client_app.py` turns into a fixed sentence.
"""
