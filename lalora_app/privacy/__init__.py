"""Privacy budget: compute ε of releases, check the limits, record every release in a ledger.

In: a planned release (sampling rate, noise multiplier, number of steps), the ledger's past
releases, the limits of run and site. Out: a reservation, committed to the ledger before any noise
is drawn, or a `BudgetError`.
"""
