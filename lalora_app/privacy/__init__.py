"""The privacy boundary: per-example gradients, clip, noise, accounting, ledger and policy."""
