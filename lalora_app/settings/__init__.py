"""Read and check the configuration of a run.

In: Flower's flat run config, TOML files, key=value overrides. Out: a frozen `Config`, or one error
that names the key, its value and the rule that it breaks.
"""
