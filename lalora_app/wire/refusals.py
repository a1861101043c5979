"""The fixed sentences with which a client reports a failure to the server."""

from lalora_app.wire.tensors import WireError

# Privacy: a refusal holds no value and no text of an exception.
REFUSALS = {
    "budget": "a privacy limit of the client would be exceeded",
    "busy": "the client's ledger is in use by another process; try again later",
    "policy": "the client's policy does not allow this run; see the client's log",
    "config": "the run config or the node config breaks a law; see the client's log",
    "central": "central must be false at a site with its own data",
    "data": "a client must have at least one example",
    "data-path": "data-path must be a readable folder, or a readable .jsonl, .json, .parquet, "
    ".csv, .tsv or .txt file",
    "data.name": "the dataset must be there, and hold at least one example",
    "data.input-column": "every row must have a text or a readable image, as model.task needs",
    "data.label-column": "the label column must exist",
    "rows": "the columns of a client's own data must exist, and every row must be usable",
    "data.client-column": "the client column must exist, with a value for each client",
    "data.partitioner": "data.partitioner must be able to divide the examples among the clients",
    "data.labels": "every row must have a label, and data.labels must name it",
    "data.task-column": "the column of the tasks must exist",
    "data.task-values": "every row must have a value in the column of the tasks, and "
    "data.task-values must name it",
    "data.test-fraction": "data.test-fraction must leave at least one training and one test "
    "example",
    "data.test-split": "data.test-split must not be the training split; a single file has "
    "only one split",
    "train.batch-size": "train.batch-size must be at most the client's number of examples",
    "privacy.delta": "privacy.delta must be below 1/n, n the client's number of examples",
    "stage": "the stages of secure aggregation must come in order, from one attempt",
    "peers": "every client of the attempt must be one of the client's pinned peers, with the same "
    "run config",
    "update": "the update must be finite, and within the range of secure aggregation",
    "held": "the client's copy of the server's tensors is missing or different; the next request "
    "sends all tensors",
    "model": "the base model or its tokenizer is not the server's; see the client's log",
    "request": "the request does not fit the client's model or run config",
    "internal": "the client failed; see the client's log",
}


class RefusedError(WireError):
    """A client's refusal; ``key`` is one of :data:`REFUSALS`."""

    def __init__(self, key: str):
        self.key = key if key in REFUSALS else "internal"
        self.law = REFUSALS[self.key].removeprefix(self.key + " ")
        super().__init__(f"refused: {REFUSALS[self.key]}")
