"""LaLoRA: federated LoRA fine-tuning under example-level differential privacy, as a Flower app."""

__version__ = "0.1.0"
