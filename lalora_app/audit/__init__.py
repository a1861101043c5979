"""Audits: attack the private training and compare the success with the promised ε.

In: the app's private step, client and server, with canaries among the examples. Out: a lower bound
on epsilon at a stated confidence; mechanisms with a known defect must be called broken.
"""
