"""Audits: attack the private training and compare the success with the promised ε.

In: the app's private step and rounds, with inserted examples (canaries). Out: a lower bound of ε at
a stated confidence, and whether it exceeds the ledger's ε. Audits of deliberately broken mechanisms
must find a violation.
"""
