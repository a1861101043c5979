"""Server rules: (global adapter, weights, uploads, round) -> Aggregated. One function a paper."""
