"""Attack the private training and compare the attack's success with the promised epsilon.

In: the app's private step and rounds, with planted examples. Out: a lower bound of epsilon, with
the confidence of the bound; broken mechanisms must fail.
"""
