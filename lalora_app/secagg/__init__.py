"""The secure-aggregation protocol: masked uploads that the server can only add up.

In: a client's upload, and the messages of the protocol's stages. Out: a masked upload at the
client, and the sum of the uploads at the server.
"""
