"""The secure-aggregation protocol (SecAgg+): the server learns only the sum of the uploads.

In: a client's upload, and the messages of the protocol's four stages. Out: a masked upload at the
client, and the sum of the uploads at the server. `client.py` has the client's side of every stage,
`session.py` the server's side.
"""
