"""Decide how much may still be released from a dataset, and record every release.

In: a planned release (sampling rate, noise multiplier, count), the ledger's past releases, the
limits of run and site. Out: a reservation that is committed to the ledger, or a `BudgetError`.
"""
