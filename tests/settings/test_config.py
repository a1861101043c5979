"""The run config: defaults, presets, and a one-line error for every value that is not allowed."""

import math
import re
import tomllib

import pytest

from conftest import ROOT, defaults, make_config
from lalora_app.comparison.plan_file import read_plan
from lalora_app.comparison.summary import read_file
from lalora_app.methods.compatibility import REFUSED, lookup, method_of
from lalora_app.methods.table import METHODS
from lalora_app.results.run_folder import to_toml
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.run_config import flatten, from_tables, parse

INF, NAN = math.inf, math.nan
PRESETS = sorted((ROOT / "configs").rglob("*.toml"))

OUT_OF_RANGE = [
    ("method", ""),
    ("num-server-rounds", 0),
    ("fraction-train", 0.0),
    ("fraction-train", 1.5),
    ("fraction-train", NAN),
    ("min-clients", 0),
    ("min-replies", 0),
    ("round-timeout", 0.0),
    ("round-timeout", INF),
    ("node-timeout", -1.0),
    ("evaluate-every", 0),
    ("privacy.noise-share", "all"),
    ("privacy.colluding", -1),
    ("train.sampling-rate", -0.1),
    ("train.sampling-rate", 1.1),
    ("train.sampling-rate", NAN),
    ("train.union-size", -1),
    ("weighting", "size"),
    ("robust", "mean"),
    ("secure-aggregation", "secagg"),
    ("suspects", -1),
    ("rule.period", 0),
    ("rule.rank-decay", 0.0),
    ("rule.rank-decay", 1.1),
    ("rule.rank-decay", NAN),
    ("rule.tail-penalty", -0.1),
    ("rule.tail-penalty", NAN),
    ("rule.fair-weight", -0.1),
    ("rule.fair-weight", NAN),
    ("rule.residual-rank", -1),
    ("rule.flat-radius", -1.0),
    ("rule.lr-ratio", 0.0),
    ("rule.filter-order", 0),
    ("rule.global-pull", -0.5),
    ("rule.global-pull", INF),
    ("rule.lr-gate", 0.0),
    ("rule.gate-temperature", 0.0),
    ("rule.tasks", 0),
    ("rule.task-rank-decay", 0.0),
    ("rule.task-rank-decay", 1.1),
    ("rule.merge-tolerance", 1.0),
    ("rule.sparsity-steps", 0),
    ("rule.sparsity-spread", 1.0),
    ("rule.sparsity-spread", -0.1),
    ("rule.merge-tolerance", -0.1),
    ("rule.sparsity", 1.0),
    ("rule.sparsity", -0.1),
    ("server.optimizer", "fedadam"),
    ("server.lr", 0.0),
    ("server.lr", INF),
    ("server.momentum", 1.0),
    ("server.momentum", NAN),
    ("server.average", "ema"),
    ("server.average", "ema:1"),
    ("server.average", "ema:1.0"),
    ("server.average", "ema:-0.1"),
    ("server.average", "ema:.9"),
    ("server.average", "tail:0"),
    ("server.average", "tail:0.000"),
    ("server.average", "tail:1.01"),
    ("server.average", "tail:nan"),
    ("server.average", "mean:0.5"),
    ("server.average", "tail:0.5 "),
    ("lora.ranks", "4;8"),
    ("lora.ranks", "4,0"),
    ("lora.ranks", ""),
    ("seed", -1),
    ("output", "results"),
    ("output", "./results"),
    ("output", ""),
    ("resume-from", "some-run"),
    ("compare", "plan.json"),
    ("model.name", " "),
    ("model.max-length", 0),
    ("model.min-length", 0),
    ("model.pooling", "cls"),
    ("model.head", "means"),
    ("privacy.head-share", 0.0),
    ("privacy.head-share", 1.0),
    ("privacy.head-share", NAN),
    ("train.head-rounds", -1),
    ("model.device", "gpu"),
    ("model.dtype", "float16"),
    ("model.task", "chat"),
    ("model.weights", "best"),
    ("model.image-size", 0),
    ("model.image-resize", 0),
    ("model.attention", "flash"),
    ("lora.rank", 0),
    ("lora.rank", -8),
    ("lora.alpha", 0.0),
    ("lora.alpha", INF),
    ("lora.targets", ""),
    ("lora.kernel", "fast"),
    ("lora.layers", "last"),
    ("lora.layers", "last:0"),
    ("lora.layers", "last:02"),
    ("lora.layers", "last:-1"),
    ("lora.layers", "last:2 "),
    ("lora.layers", "first:2"),
    ("lora.layers", "2"),
    ("data.name", ""),
    ("data.input-column", ""),
    ("data.label-column", ""),
    ("data.labels", "ham,ham"),
    ("data.encoding", "no-such"),
    ("data.separator", ",,"),
    ("data.separator", '"'),
    ("data.separator", "\n"),
    ("data.labels", "1,1.0"),
    ("data.white-level", -1.0),
    ("data.num-labels", 1),
    ("data.subset", ""),
    ("data.train-split", " "),
    ("data.test-split", ""),
    ("data.partitioner", "random"),
    ("data.classes-per-client", 0),
    ("data.shards-per-client", 0),
    ("data.client-column", ""),
    ("data.tasks", 0),
    ("data.task-column", ""),
    ("data.task-values", "books"),
    ("data.task-order", "random"),
    ("data.test-fraction", 0.0),
    ("data.test-fraction", 1.0),
    ("data.dirichlet-alpha", 0.0),
    ("data.dirichlet-alpha", NAN),
    ("privacy.epsilon", 0.0),
    ("privacy.epsilon", -1.0),
    ("privacy.epsilon", NAN),
    ("privacy.delta", 0.0),
    ("privacy.delta", 1.0),
    ("privacy.delta", NAN),
    ("privacy.clip-norm", 0.0),
    ("privacy.clip-norm", NAN),
    ("privacy.clip-norm", 1e-7),  # float32 squares vanish below it
    ("privacy.clip-norm", 1e7),
    ("privacy.clipping", "auto"),
    ("train.schedule", "linear"),
    ("train.warm-up", 1.0),
    ("train.warm-up", -0.1),
    ("train.warm-up", NAN),
    ("train.views", 0),
    ("privacy.noise", "none"),
    ("train.local-steps", 0),
    ("train.batch-size", 0),
    ("train.micro-batch", 0),
    ("train.optimizer", "adam"),
    ("train.lr-a", NAN),
    ("train.lr-b", INF),
    ("train.lr-w", -1.0),
    ("train.lr-head", 0.0),
    ("train.lr-decay", 0.0),
    ("train.lr-decay", 1.01),
    ("train.momentum", 1.0),
    ("train.momentum", -0.1),
    ("train.weight-decay", -0.1),
    ("train.weight-decay", INF),
]
MISTYPED = [
    ("privacy.epsilon", "3"),
    ("privacy.epsilon", True),
    ("lora.rank", True),
    ("lora.rank", 8.0),
    ("lora.rank", "8"),
    ("seed", False),
    ("data.public-size", 1),
    ("data.public-size", "false"),
    ("method", 7),
    ("output", None),
]
SHARED = {
    "privacy.noise-share": "sum",
    "secure-aggregation": "secagg+",
    "train.local-steps": 1,
    "train.sampling-rate": 0.1,
}
LANGUAGE = {"model.task": "causal-lm", "model.pooling": "model"}
AT_THE_EDGE = [
    ("train.head-rounds", 9),  # of 10 rounds
    ("fraction-train", 1.0),
    ("seed", 0),
    ("resume-from", "~/runs/one"),
    ("data.dirichlet-alpha", INF),
    ("privacy.epsilon", INF),
    ("train.lr-decay", 1.0),
    ("train.momentum", 0.0),
    ("train.weight-decay", 0.0),
    ("output", "/results"),
    ("lora.layers", "last:1"),
    ("lora.layers", "last:100"),
    ("server.momentum", 0.0),
    ("server.average", "ema:0"),
    ("server.average", "ema:0.999999999"),
    ("server.average", "tail:1"),
    ("server.average", "tail:1.0"),
    ("server.average", "tail:0.000000001"),
]


def complaint(changes: dict[str, object], drop: str | None = None) -> str:
    values = defaults() | changes
    values.pop(drop or "", None)
    with pytest.raises(ConfigError) as caught:
        parse(values)
    return str(caught.value)


def test_defaults_parse_and_come_back_unchanged():
    assert flatten(parse(defaults())) == defaults()


def test_defaults_are_private_and_their_method_has_what_it_needs():
    config = make_config()
    assert config.privacy.private
    assert lookup(config.method, config.train.local_steps) is METHODS[config.method]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_parse_over_the_defaults_and_say_nothing_twice(preset):
    tables = tomllib.loads(preset.read_text("utf-8"))
    read_plan(read_file(preset), defaults())
    changes = from_tables({key: table for key, table in tables.items() if key != "compare"})
    config = make_config(**changes)
    for method in tables.get("compare", {}).get("methods", [config.method]):
        lookup(method, config.train.local_steps)
    assert {key: value for key, value in changes.items() if defaults()[key] == value} == {}


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named_in_one_line(key, value):
    message = complaint({key: value})
    assert message.startswith(f"{key}={value!r} must ")
    assert "\n" not in message


@pytest.mark.parametrize(("key", "value"), MISTYPED)
def test_a_value_of_the_wrong_type_is_named_in_one_line(key, value):
    message = complaint({key: value})
    assert message.startswith(f"{key}={value!r} must be of type ")
    assert message.endswith(f"not {type(value).__name__}")
    assert "\n" not in message


@pytest.mark.parametrize(("key", "value"), AT_THE_EDGE)
def test_values_at_the_edge_of_a_law_are_taken(key, value):
    assert flatten(make_config(**{key: value}))[key] == value


def test_every_key_has_a_default_and_a_law_that_some_value_breaks():
    lawless = {
        "central",
        "data.public-size",
        "model.checkpointing",
        "model.prefix-cache",
        "model.task-heads",
    }  # only their type can be wrong
    assert {key for key, _ in OUT_OF_RANGE} == set(defaults()) - lawless


def test_shared_noise_is_taken_with_its_laws_kept_and_without_noise_from_a_seed():
    assert make_config(**SHARED).privacy.shared
    inf = {"privacy.noise": "seeded", "privacy.epsilon": INF}
    assert make_config(**SHARED, **inf).privacy.shared
    assert not make_config(**{"train.sampling-rate": 0.1}).privacy.shared


def test_a_sampling_rate_stands_in_place_of_the_batch_size():
    rated, batches = make_config(**{"train.sampling-rate": 0.1}).train, make_config().train
    assert (rated.rate(50), rated.rate(5000), rated.fewest) == (0.1, 0.1, 1)
    assert batches.rate(1000) == batches.batch_size / 1000
    assert batches.fewest == batches.batch_size


def test_an_integer_is_taken_for_a_float_and_becomes_one():
    value = make_config(**{"privacy.epsilon": 3}).privacy.epsilon
    assert value == 3
    assert type(value) is float


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("privacy.epsillon", "privacy.epsilon"),
        ("train.localsteps", "train.local-steps"),
        ("num-rounds", "num-server-rounds"),
        ("lora.r", "lora.rank"),
        ("epsilon", "privacy.epsilon"),
        ("LORA.Rank", "lora.rank"),
        ("alpha", "lora.alpha"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(typo, nearest):
    message = complaint({typo: 1})
    assert message == f'{typo}=1 is no key of a run; did you mean "{nearest}"?'


@pytest.mark.parametrize("word", ["colour", "x", "train.foo.bar.baz", "gpu"])
def test_an_unknown_key_far_from_all_keys_gets_no_suggestion(word):
    assert complaint({word: 1}) == f"{word}=1 is no key of a run"


@pytest.mark.parametrize("key", sorted(defaults()))
def test_a_missing_key_is_named(key):
    message = complaint({}, drop=key)
    assert message.startswith(f"{key} is missing")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"robust": "krum", "suspects": 1}, ["min-replies=2", "at least 5", "krum"]),
        ({"robust": "trimmed-mean", "suspects": 1}, ["min-replies=2", "at least 3"]),
        ({"suspects": 1, "min-replies": 3}, ["suspects=1", "must be 0", "none"]),
        ({"robust": "median", "suspects": 1, "min-replies": 3}, ["suspects=1", "median"]),
        (
            {"model.head": "class-means", "train.head-rounds": 9},
            ["num-server-rounds=10", "above 10", "class-means", "train.head-rounds=9"],
        ),
        ({"train.head-rounds": 10}, ["num-server-rounds=10", "above 10", "train.head-rounds=10"]),
        (
            LANGUAGE | {"model.head": "zero"},
            ['model.head="zero"', '"auto"', "causal-lm", "no head"],
        ),
        (LANGUAGE | {"train.head-rounds": 1}, ["train.head-rounds=1", "must be 0", "no head"]),
        *(
            (SHARED | {key: value}, [f"{key}={text} must be {only}", "noise-share"])
            for key, value, text, only in (
                ("secure-aggregation", "none", '"none"', '"secagg+"'),
                ("train.local-steps", 2, "2", "1"),
                ("fraction-train", 0.5, "0.5", "1.0"),
                ("train.optimizer", "adamw", '"adamw"', '"sgd"'),
                ("train.momentum", 0.5, "0.5", "0.0"),
                ("train.weight-decay", 0.1, "0.1", "0.0"),
                ("train.sampling-rate", 0.0, "0.0", "above 0"),
                ("model.head", "class-means", '"class-means"', "another start"),
                ("privacy.noise", "seeded", '"seeded"', '"secure"'),
            )
        ),
    ],
)
def test_a_robust_mean_needs_more_replies_than_suspects_can_outvote(changes, words):
    message = complaint(changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_method_without_a_guarantee_is_refused_with_the_reason(name):
    with pytest.raises(
        ConfigError, match=re.escape(f'method="{name}" is refused: {REFUSED[name]}')
    ):
        lookup(name, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "la-lora", "lora.ranks": "4,8"},
        {"method": "flora", "robust": "median"},
        {"method": "lora-fair", "robust": "trimmed-mean"},
    ],
)
def test_combinations_that_a_method_does_not_declare_are_refused(changes):
    with pytest.raises(ConfigError, match='must be "none" for method'):
        method_of(make_config(**changes))
    wanted = "flora" if "lora.ranks" in changes else "la-lora"
    method_of(make_config(**changes | {"method": wanted}))


@pytest.mark.parametrize("epsilon", [0.5, 1000.0])
def test_no_clipping_is_possible_only_without_privacy(epsilon):
    message = complaint({"privacy.clip-norm": INF, "privacy.epsilon": epsilon})
    assert "privacy.clip-norm=inf" in message
    assert f"privacy.epsilon={epsilon}" in message
    assert "\n" not in message
    config = make_config(**{"privacy.clip-norm": INF, "privacy.epsilon": INF})
    assert not config.privacy.private


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, 'model.task="text-classification": only images have views'),
        ({"model.task": "causal-lm", "data.label-column": "none"}, 'model.task="causal-lm"'),
        (
            {"model.task": "image-classification", "model.prefix-cache": True},
            "model.prefix-cache=true: the kept states",
        ),
    ],
)
def test_only_images_whose_states_are_not_kept_have_views(changes, words):
    changes = {"model.pooling": "model", "data.partitioner": "iid"} | changes
    message = complaint(changes | {"train.views": 4})
    assert message.startswith(f"train.views=4 must be 1 for {words}")
    assert "\n" not in message
    assert make_config(**changes | {"train.views": 1}).train.views == 1


def test_images_may_have_views():
    image = {"model.task": "image-classification", "model.pooling": "model"}
    assert make_config(**image | {"train.views": 16}).train.views == 16


@pytest.mark.parametrize("optimizer", ["adam", "yogi"])
def test_an_adaptive_optimiser_of_the_server_needs_a_small_rate(optimizer):
    message = complaint({"server.optimizer": optimizer})  # the default rate is 1
    assert f'server.lr=1.0 must be below 1 for server.optimizer="{optimizer}"' in message
    assert "\n" not in message
    assert make_config(**{"server.optimizer": optimizer, "server.lr": 0.99}).server.lr == 0.99


def test_automatic_clipping_needs_a_clip_norm():
    changes = {"privacy.clip-norm": INF, "privacy.epsilon": INF, "privacy.clipping": "automatic"}
    message = complaint(changes)
    assert 'privacy.clip-norm=inf must be finite for privacy.clipping="automatic"' in message
    assert "\n" not in message


def test_seeded_noise_is_not_private():
    assert not make_config(**{"privacy.noise": "seeded"}).privacy.private


def test_momentum_belongs_to_sgd():
    message = complaint({"train.momentum": 0.9, "train.optimizer": "adamw"})
    assert "train.momentum=0.9" in message
    assert "adamw" in message
    assert "\n" not in message
    assert make_config(**{"train.momentum": 0.9, "train.optimizer": "sgd"}).train.momentum == 0.9


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("la-lra", "la-lora"), ("RoLoRA", "rolora"), ("ffa", "ffa-lora"), ("dplora", "dp-lora")],
)
def test_an_unknown_method_is_named_with_the_nearest_one(typo, nearest):
    with pytest.raises(ConfigError) as caught:
        lookup(typo, 2)
    message = str(caught.value)
    assert f'method="{typo}"' in message
    assert message.endswith(f'did you mean "{nearest}"?')
    assert "\n" not in message


def test_an_unknown_method_far_from_all_methods_gets_no_suggestion():
    with pytest.raises(ConfigError, match="must be one of") as caught:
        lookup("adam", 2)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("la-lora")])
def test_methods_that_send_a_factor_they_would_not_train_are_refused(name):
    with pytest.raises(ConfigError) as caught:
        lookup(name, 1)
    message = str(caught.value)
    assert "train.local-steps=1 must be" in message
    assert f"method {name}:" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("la-lora")])
def test_one_local_step_is_enough_for_methods_that_do_not_alternate_by_step(name):
    assert lookup(name, 1) is METHODS[name]


@pytest.mark.parametrize("name", METHODS)
def test_two_local_steps_are_enough_for_every_method(name):
    assert lookup(name, 2) is METHODS[name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy.epsilon": INF, "privacy.clip-norm": INF, "data.dirichlet-alpha": INF},
        {"privacy.delta": 1e-12, "train.lr-a": 1e20, "train.weight-decay": 5e-324},
        {"data.name": '/tmp/"quoted"\\ and\ttabbed é☃.csv', "data.public-size": True},
    ],
    ids=["defaults", "inf", "extreme floats", "odd text"],
)
def test_the_written_config_reads_back_with_every_value_and_type(changes):
    config = make_config(**changes)
    read = from_tables(tomllib.loads(to_toml(config)))
    assert parse(read) == config
    assert read == defaults() | {"data.num-labels": 2} | changes
    assert {k: type(v) for k, v in read.items()} == {k: type(v) for k, v in defaults().items()}
