"""Messages between server and clients, and the checks of each received message.

In: Flower records. Out: typed requests and replies, or an error. A client's refusal is always one
of the fixed sentences in `refusals.py`.
"""
