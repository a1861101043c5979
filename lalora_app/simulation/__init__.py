"""Simulate a run or a comparison on one machine, and show it.

In: a run config. Out: an exit code, and the results folder of the run. `start.py` checks, starts
and ends a run; `local_engine.py` runs it in a server process (`local_process.py`) with worker
processes, `flower_engine.py` in Flower's simulation; `launch_checks.py` checks it before it starts;
`run_display.py` draws the progress bar.
"""
