"""The `lalora` command: parse arguments, start runs and audits, print results.

In: command-line arguments. Out: an exit code; every error is one line on standard error.
Runs are started by `simulation/`.
"""
