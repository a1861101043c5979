"""The tables of the run config, one frozen dataclass per table: keys, laws and meanings."""

from dataclasses import dataclass

from lalora_app.settings.names import AUTO, CLASS_MEANS, NONE
from lalora_app.settings.value_rules import (
    LAST,
    are_ranks,
    class_list,
    class_names_in,
    columns,
    count,
    device,
    encoding,
    law,
    layers,
    non_empty,
    not_negative,
    one_of,
    positive,
    switch,
    value_list,
)

TASKS = ("text-classification", "image-classification", "causal-lm")
BY_LABEL = ("dirichlet", "pathological", "shard")  # partitioners that read the labels
PARTITIONERS = (*BY_LABEL, "iid", "natural-id", "linear", "square", "exponential")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The frozen backbone."""

    name: str = non_empty(
        meaning="Pretrained model: a Hugging Face id, a local folder, `timm:` with an architecture "
        "or a folder, or the bundled `demo:all-MiniLM-L6-v2`."
    )
    task: str = one_of(*TASKS, meaning="Task that the model is trained for.")
    weights: str = one_of(
        "pretrained", "random", meaning="Initial weights; `random` builds the architecture only."
    )
    pooling: str = one_of(
        "mean",
        "model",
        meaning="Input of a text classifier's head: the mean of the token outputs, or the "
        "architecture's own pooling and head. Other tasks need `model`.",
    )
    head: str = one_of(
        AUTO,
        "zero",
        CLASS_MEANS,
        meaning="Start of the head: `auto` is the checkpoint's own where it fits the classes, else "
        "random; `zero`; or `class-means`, one noised release of every client in round 1 "
        "([models](models.md#the-start-of-the-head)).",
    )
    task_heads: bool = switch(
        meaning="One head per task of `data.tasks`: an example chooses among the classes of its "
        "own task only, and a closed task's part of the head rests ([tasks](tasks.md#heads))."
    )
    max_length: int = count(meaning="Largest length of a text in tokens; longer texts are cut.")
    min_length: int = count(
        meaning="Smallest padded length of a text in tokens; longer texts are padded to the next "
        "power of two, up to `model.max-length` ([performance](performance.md#padding))."
    )
    image_size: int = count(
        meaning="Side in pixels of the square image that the model receives: the middle of the "
        "resized image."
    )
    image_resize: int = count(
        meaning="Shorter side in pixels after the resize, before the square is cut out."
    )
    device: str = device(
        meaning="Device of the model; `auto` takes a GPU where there is one. The `device` of a "
        "client's node config replaces it.",
    )
    dtype: str = one_of(
        "auto",
        "float32",
        "bfloat16",
        meaning="Number type of the frozen model's matrix products; `auto` is bfloat16 on a GPU "
        "and float32 on a CPU.",
    )
    attention: str = one_of(
        "auto", "sdpa", "eager", meaning="Implementation of attention; `auto` leaves the choice."
    )
    checkpointing: bool = switch(
        meaning="Compute activations a second time in the backward pass, to need less memory."
    )
    prefix_cache: bool = switch(
        meaning="Keep each example's hidden states at the first adapted block, in bfloat16, and "
        "start training steps there; needs `lora.layers` such as `last:2`. `head-only` keeps the "
        "head's input, with any layers ([performance](performance.md#a-cache-below-the-adapters))."
    )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter: ΔW = (alpha / rank) · B·A on every target layer."""

    rank: int = count(meaning="Rank r of the adapter; with `lora.ranks` the largest rank.")
    alpha: float = positive(meaning="Numerator of the adapter's scale alpha / rank.")
    targets: str = non_empty(
        meaning="Names of the Linear layers with an adapter, separated by commas; `auto` takes the "
        "usual ones of the architecture, `all-linear` all of them but the head, the output layer "
        "of a language model and layers that LoRA cannot train ([models](models.md))."
    )
    layers: str = layers(
        meaning="Blocks of the model with an adapter: `all`, or only the last ones, such as "
        "`last:2`. Layers outside of the blocks then have none."
    )
    ranks: str = law(
        'must be "none" or ranks such as "4,8,16"',
        are_ranks,
        meaning="Ranks of the simulated clients, for methods with mixed ranks: the clients take "
        "them in the order of the list, again and again; each at most `lora.rank`.",
    )
    kernel: str = one_of(
        "fused",
        "merged",
        "plain",
        "compiled",
        meaning="Implementation of the private step: `fused` is the usual choice, `merged` uses "
        "more memory for speed, `plain` is the reference, `compiled` uses torch.compile.",
    )

    @property
    def last_blocks(self) -> int | None:
        """Number of last blocks with an adapter; None: all layers, of blocks or not."""
        found = LAST.fullmatch(self.layers)
        return int(found[1]) if found else None


@dataclass(frozen=True, kw_only=True)
class Data:
    """The dataset, its public test split, and the partition into simulated clients."""

    name: str = non_empty(
        meaning="Dataset: a Hugging Face id; a `.csv`, `.tsv`, `.txt`, `.json`, `.jsonl` (all also "
        "with `.gz`) or `.parquet` file; a folder of them, or of images by class; or the bundled "
        "`demo:sms-spam`."
    )
    subset: str = non_empty(
        meaning="Subset of a Hugging Face dataset, such as `sst2`; `none` for a dataset with "
        "only one."
    )
    train_split: str = non_empty(meaning="Name of the training split.")
    test_split: str = non_empty(
        meaning="Name of the public test split, which no client trains on; `none` takes "
        "`data.test-fraction` of the training split."
    )
    encoding: str = encoding(
        meaning="Encoding of local text files, such as `cp1252`; `auto` goes by the byte order "
        "mark, else UTF-8."
    )
    separator: str = law(
        'must be "auto", "tab", or one character that is no double quote and no line end',
        lambda v: v in ("auto", "tab") or (len(v) == 1 and v not in '"\r\n'),
        meaning="Separator of the columns of local text files; `auto` finds it in the header. A "
        "`.txt` file with `auto` holds one text per line, in the column `text`.",
    )
    white_level: float = not_negative(
        meaning="Pixel value of white, such as 4095 for images of 12 bits; 0 takes the largest "
        "value of the file's type."
    )
    input_column: str = columns(meaning="Column of the texts or images, or two text columns.")
    label_column: str = non_empty(meaning="Column of the labels; `none` for a language model.")
    labels: str = class_list(
        meaning="Names of the classes in the order of the model's outputs, such as `ham,spam`, or "
        "a JSON list; `auto` takes those of the public data, sorted."
    )
    num_labels: int = law(
        "must be 0, or at least 2",
        lambda v: v == 0 or v >= 2,
        meaning="Number of classes; 0 takes the number of `data.labels`. With `auto`, labels that "
        "are integers below it count from 0, classes that never occur included.",
    )
    test_fraction: float = law(
        "must be in (0, 1)",
        lambda v: 0 < v < 1,
        meaning="Share of the training split that becomes the test split; a hash of an "
        "example's content decides.",
    )
    partitioner: str = one_of(
        *PARTITIONERS,
        meaning="Rule of Flower Datasets that deals the examples to the simulated clients.",
    )
    dirichlet_alpha: float = law(
        "must be greater than 0 (inf: IID)",
        lambda v: v > 0,
        meaning="Concentration of the labels for `dirichlet`: the smaller, the more different "
        "the clients.",
    )
    classes_per_client: int = count(meaning="Classes per client for `pathological`.")
    shards_per_client: int = count(meaning="Shards per client for `shard`.")
    client_column: str = non_empty(
        meaning="Column that names the owner of an example, for `natural-id`."
    )
    tasks: int = count(
        meaning="Number of tasks that come one after the other, each in a block of rounds with "
        "examples of its own; 1: all examples in every round ([tasks](tasks.md))."
    )
    task_column: str = non_empty(
        meaning="Column whose values are divided among `data.tasks`, such as `domain`; `none` "
        "divides the classes."
    )
    task_values: str = value_list(
        meaning="Values of `data.task-column` in the order of the tasks, such as `books,films`, or "
        "a JSON list; `auto` takes those of the training split of `data.name`, sorted."
    )
    task_order: str = one_of(
        "listed",
        "seeded",
        meaning="Order in which classes or values are dealt to the tasks: as they are listed, or "
        "shuffled by `seed`.",
    )
    public_size: bool = switch(
        meaning="In simulation, allow clients to send their number of examples. A client with "
        "its own data decides in its node config."
    )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; the numbers from 0 while ``labels`` is "auto"."""
        if self.labels == AUTO:
            return tuple(map(str, range(self.num_labels)))
        return class_names_in(self.labels)

    @property
    def by_column(self) -> bool:
        """Whether the tasks divide the values of a column, and not the classes."""
        return self.task_column != NONE

    @property
    def divided(self) -> tuple[str, ...]:
        """Names of the classes, or of the column's values, that the tasks divide, in their order.

        Limit: empty while ``task_values`` is "auto".
        """
        if not self.by_column:
            return self.class_names
        return () if self.task_values == AUTO else class_names_in(self.task_values)
