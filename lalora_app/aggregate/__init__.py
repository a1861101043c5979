"""Server rules: (global adapter, weights, uploads) -> global adapter. One function a paper."""

from lalora_app.aggregate.mean import mean

__all__ = ["mean"]
