"""The site worker: a process that a site keeps between messages, with model and encoded data.

In: a message of the ClientApp and its context, over a socket in the site's state folder. Out: the
content of the reply, and the context's new state. `hand_over.py` runs in the process that Flower
starts for a message, `process.py` is the site worker, `handshake.py` says when both may talk.
"""
