"""Imports of a worker that take seconds, for the process from which the workers are forked."""

import flwr_datasets.partitioner  # noqa: F401
import opacus.accountants  # noqa: F401
import peft  # noqa: F401
import transformers.modeling_utils  # noqa: F401

import lalora_app.client.requests
import lalora_app.workers.worker  # noqa: F401
