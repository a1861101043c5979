"""Run many configurations of one study and summarise them.

In: a plan file. Out: one run folder per cell of the plan, and a summary page.
"""
