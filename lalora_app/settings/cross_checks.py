"""Laws of the run config that concern several keys."""

import json
import math

from lalora_app.settings.config import Config
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import AUTO, CLASS_MEANS, NONE
from lalora_app.settings.sections import BY_LABEL


def _check_model(config: Config) -> None:
    model, data = config.model, config.data
    if model.pooling == "mean" and model.task != "text-classification":
        raise ConfigError(f'model.pooling="mean" must be "model" for model.task="{model.task}"')
    if model.image_resize < model.image_size:
        raise ConfigError(
            f"model.image-resize={model.image_resize} must be at least model.image-size="
            f"{model.image_size}, the side of the square that is cut from the resized image"
        )
    if data.label_column == "none" and model.task != "causal-lm":
        raise ConfigError(f'data.label-column="none" must name a column for "{model.task}"')
    if data.num_labels and data.num_labels != len(data.class_names):
        raise ConfigError(
            f"data.num-labels={data.num_labels} must be {len(data.class_names)}, the number of "
            "names in data.labels, or 0"
        )
    if data.label_column == "none" and data.partitioner in BY_LABEL:
        raise ConfigError(
            f'data.partitioner="{data.partitioner}" must be one that needs no labels while '
            'data.label-column="none"'
        )


def _check_robust(config: Config) -> None:
    kind, suspects = config.robust, config.suspects
    fewest = {"none": 1, "krum": 2 * suspects + 3}.get(kind, 2 * suspects + 1)
    if config.min_replies < fewest:
        raise ConfigError(
            f"min-replies={config.min_replies} must be at least {fewest} for "
            f'robust="{kind}" with suspects={suspects}'
        )
    if suspects and kind in ("none", "median"):
        raise ConfigError(
            f'suspects={suspects} must be 0 for robust="{kind}", which does not use it'
        )


def _check_views(config: Config) -> None:
    views, model = config.train.views, config.model
    if views > 1 and model.task != "image-classification":
        raise ConfigError(
            f'train.views={views} must be 1 for model.task="{model.task}": only images have views'
        )
    if views > 1 and model.prefix_cache:
        raise ConfigError(
            f"train.views={views} must be 1 for model.prefix-cache=true: the kept states are those "
            "of the image itself"
        )


def _check_head(config: Config) -> None:
    head, rounds = config.model.head, config.train.head_rounds
    no_head = 'for model.task="causal-lm", which has no head'
    if config.model.task == "causal-lm" and head != AUTO:
        raise ConfigError(f'model.head="{head}" must be "auto" {no_head}')
    if config.model.task == "causal-lm" and rounds:
        raise ConfigError(f"train.head-rounds={rounds} must be 0 {no_head}")
    if config.model.task == "causal-lm" and config.model.task_heads:
        raise ConfigError(f"model.task-heads=true must be false {no_head}")
    if config.head_rounds >= config.num_server_rounds:
        raise ConfigError(
            f"num-server-rounds={config.num_server_rounds} must be above {config.head_rounds}, the "
            f'rounds of the head alone with model.head="{head}" and train.head-rounds={rounds}'
        )


def _check_server(config: Config) -> None:
    server = config.server
    if server.optimizer in ("adam", "yogi") and server.lr >= 1:
        raise ConfigError(
            f'server.lr={server.lr} must be below 1 for server.optimizer="{server.optimizer}", '
            "which moves each entry by about server.lr in every round; begin with 0.01"
        )


def _check_shared(config: Config) -> None:
    """Check the laws of noise that only the sum of all uploads has whole.

    One step per round, since a second one would start from weights that only a share of the noise
    protects; one rate and one number of releases for all, so that all need the same noise.
    """
    privacy, train = config.privacy, config.train
    if not privacy.shared:
        return
    for key, value, only in (
        ("secure-aggregation", config.secure_aggregation, "secagg+"),
        ("train.local-steps", train.local_steps, 1),
        ("fraction-train", config.fraction_train, 1.0),
        ("train.optimizer", train.optimizer, "sgd"),  # the server steps: server.optimizer
        ("train.momentum", train.momentum, 0.0),
        ("train.weight-decay", train.weight_decay, 0.0),
    ):
        if value != only:
            raise ConfigError(
                f"{key}={json.dumps(value)} must be {json.dumps(only)} for "
                'privacy.noise-share="sum"'
            )
    if train.sampling_rate == 0:
        raise ConfigError(
            'train.sampling-rate=0.0 must be above 0 for privacy.noise-share="sum": all clients '
            "draw their examples with one probability, in place of train.batch-size"
        )
    if config.model.head == CLASS_MEANS:
        raise ConfigError(
            f'model.head="{CLASS_MEANS}" must be another start for privacy.noise-share="sum": '
            "class sums have the whole noise of each client"
        )
    if privacy.noise == "seeded" and math.isfinite(privacy.epsilon):
        raise ConfigError(
            'privacy.noise="seeded" must be "secure" for privacy.noise-share="sum" with '
            f"privacy.epsilon={privacy.epsilon}: seeds of shared noise are always secret"
        )


def _check_tasks(config: Config) -> None:
    """Check the laws of blocks of rounds that have examples of their own.

    An example trains in one block, so releases of all examples, the class sums, have no place.
    A client may have few examples of a task, so its batch has an expected size, not a rate.
    """
    data = config.data
    if not config.has_tasks:
        _require_no_task_keys(config)
        return
    law = f"for data.tasks={data.tasks}: clients have other examples, and numbers of them, per task"
    if config.model.head == CLASS_MEANS:
        raise ConfigError(f'model.head="{CLASS_MEANS}" must be another start {law}')
    for key, value, only in (
        ("train.head-rounds", config.train.head_rounds, 0),
        ("train.sampling-rate", config.train.sampling_rate, 0.0),
        ("privacy.noise-share", config.privacy.noise_share, "own"),
        ("weighting", config.weighting, "uniform"),
    ):
        if value != only:
            raise ConfigError(f"{key}={json.dumps(value)} must be {json.dumps(only)} {law}")
    if config.num_server_rounds < data.tasks:
        raise ConfigError(
            f"num-server-rounds={config.num_server_rounds} must be at least "
            f"data.tasks={data.tasks}, one round per task"
        )
    _check_divided(config)


def _check_divided(config: Config) -> None:
    """Check what the tasks divide: the classes, or another column."""
    data = config.data
    if data.by_column and data.task_column == data.label_column:
        raise ConfigError(
            f'data.task-column="{data.task_column}" must be "none" to divide the classes of '
            "data.label-column"
        )
    if data.by_column and data.task_column == data.input_column:
        raise ConfigError(
            f'data.task-column="{data.task_column}" must be another column than data.input-column: '
            "each task would be a set of single inputs"
        )
    if not data.by_column and data.task_values != AUTO:
        raise ConfigError(
            f'data.task-values="{data.task_values}" must be "{AUTO}" for data.task-column="none", '
            "which divides the classes: data.labels names them"
        )
    if config.model.task_heads and data.by_column:
        raise ConfigError(
            f'model.task-heads=true must be false for data.task-column="{data.task_column}": all '
            "tasks have the same classes"
        )
    if data.label_column == NONE and not data.by_column:
        raise ConfigError(
            f'data.task-column="none" must name a column for data.tasks={data.tasks} with '
            'data.label-column="none": there are no classes to divide'
        )


def _require_no_task_keys(config: Config) -> None:
    """Check that a run without tasks divides nothing."""
    data = config.data
    for key, value, only in (
        ("data.task-column", data.task_column, NONE),
        ("data.task-values", data.task_values, AUTO),
        ("data.task-order", data.task_order, "listed"),
        ("model.task-heads", config.model.task_heads, False),
    ):
        if value != only:
            raise ConfigError(
                f"{key}={json.dumps(value)} must be {json.dumps(only)} for data.tasks=1: there is "
                "nothing to divide"
            )


def check_together(config: Config) -> None:
    """Check the keys whose laws depend on other keys.

    Raises:
        ConfigError: naming the keys and their values.
    """
    _check_robust(config)
    _check_head(config)
    clip, epsilon = config.privacy.clip_norm, config.privacy.epsilon
    if math.isinf(clip) and math.isfinite(epsilon):
        raise ConfigError(f"privacy.clip-norm=inf must be finite while privacy.epsilon={epsilon}")
    if math.isinf(clip) and config.privacy.clipping == "automatic":
        raise ConfigError(
            'privacy.clip-norm=inf must be finite for privacy.clipping="automatic", which scales '
            "every gradient to about the clip norm"
        )
    _check_model(config)
    _check_views(config)
    _check_server(config)
    _check_shared(config)
    _check_tasks(config)
    if config.train.momentum > 0 and config.train.optimizer != "sgd":
        raise ConfigError(
            f"train.momentum={config.train.momentum} must be 0 for optimizer "
            f'"{config.train.optimizer}"'
        )
