"""The state of the server between two rounds, and the steps that change it besides a method's rule.

In: the state, the uploads of a round and the table `server` of the run config. Out: the state after
the round, with the moments of the server's optimiser and the running average of the adapters.
"""
