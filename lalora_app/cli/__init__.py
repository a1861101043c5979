"""The `lalora` command: parse arguments, start runs and audits, print results.

In: command-line arguments. Out: an exit code; every error is one line on standard error.
`run_display.py` draws the progress bar, `launch_checks.py` checks a run before Flower starts.
"""
