"""The `lalora` command: parse arguments, start runs, print results.

In: command-line arguments. Out: an exit code, and one line per error.
"""
