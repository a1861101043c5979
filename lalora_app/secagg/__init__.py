"""The secure-aggregation protocol (SecAgg+): the server learns only the sum of the uploads.

In: a client's upload, and the messages of the protocol's four stages. Out: a masked upload at the
client; at the server the sum of the uploads, and with shared noise the seeds of the superfluous
noise. The client's side is in `client.py` and `upload.py`. At the server, `session.py` has the
stages of one attempt, `pipeline.py` decides in which wave of messages each stage travels.
"""
