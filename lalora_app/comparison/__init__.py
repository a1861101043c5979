"""Run all experiments of a comparison and summarise them.

In: a plan file with methods, values of ε and seeds. Out: one run folder per experiment, tables and
a report page. Finished experiments are not repeated.
"""
