"""The command ``lalora check``: check a run, or a site's own data, and print what was found."""

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lalora_app.cli.argument_types import add_run_config, at_least_one
from lalora_app.settings.errors import ConfigError
from lalora_app.settings.names import NONE
from lalora_app.settings.run_config import Config, parse

if TYPE_CHECKING:
    from lalora_app.data.encoding import Encoded
    from lalora_app.data.examples import Examples
    from lalora_app.models.backbone import Backbone

_SHOWN_CLASSES = 12
_WHOLE = 1_000_000  # tokens; longer than any text
_NO_LIMIT = "warning   no limit: a site must set max-epsilon with delta, or policy, to take part"


def _check(args: argparse.Namespace) -> int:
    lines = _of_site(args) if args.data_path or args.node_config else _of_run(args)
    for line in lines:
        print(line, flush=True)
    return 0


def _of_run(args: argparse.Namespace) -> Iterator[str]:
    """Check a simulated run and describe it."""
    from lalora_app.server.before_start import check_data, check_model
    from lalora_app.simulation.launch import read_launch

    launch = read_launch(args.app, args.run_config, args.nodes)
    if launch.config.compare != NONE:
        raise ConfigError('compare must be "none": lalora compare checks all runs of its plan')
    found = check_data(launch.config, launch.nodes)
    config, model = found.config, check_model(found.config, launch.nodes)
    least, most = min(found.sizes), max(found.sizes)
    rows = f"{len(found.train)} rows to train on, {len(found.test)} to test"
    yield f"data      {config.data.name}: {rows}"
    yield f"clients   {len(found.sizes)}, with {least} to {most} rows each"
    yield from _described(config, found.train, model)
    model.encode(found.test)  # an image that cannot be read is told here
    smallest = [min(of_task) for of_task in zip(*found.task_sizes, strict=True)]
    yield from _costs(config, model, model.encode(found.train), smallest)


def _of_site(args: argparse.Namespace) -> Iterator[str]:
    """Check a site's own data and describe it; all of it stays on this machine."""
    from lalora_app.cli.site_limits import lines_on_limits
    from lalora_app.client.site import admit
    from lalora_app.models.backbone import build
    from lalora_app.server.before_start import check_epsilon, task_sizes
    from lalora_app.site_worker.handshake import idle_seconds

    node = _node(args)
    idle_seconds(node)  # the laws of worker and worker-idle
    config = _config_of_site(args, node)
    if not node.keys() & {"policy", "max-epsilon"}:
        yield _NO_LIMIT
        node |= {"max-epsilon": math.inf}
    site = admit(config, node, 0)
    examples = site.examples(config)
    sizes = task_sizes(config, examples)
    check_epsilon(replace(config, fraction_train=1.0), [sizes])
    model, _ = build(site.config_at_rank(config))
    yield f"data      {node['data-path']}: {len(examples)} rows"
    yield from _described(config, examples, model)
    yield from lines_on_limits(config, site, sizes)
    yield from _costs(config, model, model.encode(examples), sizes)


def _node(args: argparse.Namespace) -> dict[str, Any]:
    """Return the node config of the options, as ``flower-supernode --node-config`` reads it."""
    from lalora_app.settings.overrides import pairs

    node = pairs("--node-config", args.node_config or "")
    if args.data_path:
        node["data-path"] = args.data_path
    if "data-path" not in node:
        raise ConfigError("--node-config must have data-path, or --data-path must be given")
    return node


def _config_of_site(args: argparse.Namespace, node: Mapping[str, Any]) -> Config:
    """Return the run's config; columns and classes that ``-c`` leaves out are the site's own."""
    from lalora_app.client.own_data import keys_of_run
    from lalora_app.settings.overrides import merged
    from lalora_app.simulation.launch import app_defaults

    config = parse(app_defaults(args.app) | keys_of_run(node, merged(args.run_config)))
    # As the server does: a run that reaches a site has the number of its classes.
    return replace(config, data=replace(config.data, num_labels=len(config.data.class_names)))


def _described(config: Config, examples: "Examples", model: "Backbone") -> Iterator[str]:
    """Yield lines on labels, lengths and model."""
    if config.data.label_column != NONE:
        yield f"labels    {_label_counts(config.data.class_names, examples.labels)}"
    if (lengths := _lengths(examples, model)) is not None:
        longest = config.model.max_length
        cut = sum(length > longest for length in lengths)
        yield (
            f"lengths   {min(lengths)} to {max(lengths)} tokens, median {median(lengths):g}; "
            f"{cut} of {len(lengths)} are cut at model.max-length={longest}"
        )
    trained = sum(p.numel() for p in model.engine.parameters.values())
    whole = sum(p.numel() for p in model.model.parameters())
    yield (
        f"model     {config.model.name}: {model.targets} layers with LoRA ({_kinds(model)}), "
        f"{trained:,} of {whole:,} parameters are trained"
    )


def _label_counts(names: tuple[str, ...], labels: tuple[int, ...]) -> str:
    """Return the rows of each class as text; of many classes a summary."""
    counts = Counter(labels)
    if len(names) <= _SHOWN_CLASSES:
        return ", ".join(f"{name} {counts[index]}" for index, name in enumerate(names))
    rows = [counts[index] for index in range(len(names))]
    return f"{len(names)} classes with {min(rows)} to {max(rows)} rows, {rows.count(0)} without any"


def _lengths(examples: "Examples", model: "Backbone") -> list[int] | None:
    """Return the number of tokens of each text before any is cut; None for images."""
    encode: Any = model.encode
    if "tokenizer" not in encode.keywords:
        return None
    whole = encode.func(examples, **encode.keywords | {"max_length": _WHOLE})
    return [whole.length(index) for index in range(len(whole))]


def _kinds(model: "Backbone") -> str:
    """Return the last names of the adapted layers."""
    paths = (name.rpartition(".lora_")[0] for name in model.frozen_weights.names)
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))


def _costs(
    config: Config, model: "Backbone", data: "Encoded", sizes: Sequence[int]
) -> Iterator[str]:
    """Yield lines on noise, time and memory of one client with these rows of each task."""
    from lalora_app.cli.site_limits import steps_of_task
    from lalora_app.client.trial_step import measure_step
    from lalora_app.methods.head_rounds import class_sum_releases

    privacy = config.privacy
    for sums in class_sum_releases(config):
        yield f"head      one release of class sums: noise multiplier {sums.noise_multiplier:.3g}"
    for task, size in enumerate(sizes):
        plan = steps_of_task(config, task, size)
        steps = f"at most {plan.count} steps"
        if config.has_tasks:
            steps = f"task {task + 1} with {size} rows: {plan.count} steps if no round fails,"
        yield (
            f"privacy   {steps} with sampling rate {plan.sampling_rate:.3g}: noise multiplier "
            f"{plan.noise_multiplier:.3g} for epsilon {privacy.epsilon:g} at delta "
            f"{privacy.delta:g}"
        )
    cost = measure_step(config, model, model.adapter(), data)
    each = ", ".join(f"{seconds:.3g} s ({name})" for name, seconds in cost.seconds.items())
    rows_drawn = config.train.rate(len(data)) * len(data)
    yield (
        f"step      {each} with {rows_drawn:.4g} rows on {model.device}; largest memory "
        f"{cost.peak_bytes / 2**30:.1f} GiB"
    )
    yield "ok        no data was sent or written, no privacy budget was spent"


def add_check(commands: Any) -> None:
    """Add `lalora check` to the parser."""
    check = commands.add_parser(
        "check", help="check a run or a site's own data, and print what was found; starts nothing"
    )
    check.add_argument("app", nargs="?", type=Path, default=Path(), help="folder of the app")
    add_run_config(check)
    check.add_argument(
        "--nodes", type=at_least_one, help="number of simulated clients of a run (default 4)"
    )
    check.add_argument("--data-path", help="a site's own file or folder, in place of a run's data")
    check.add_argument(
        "--node-config",
        metavar="KEY=VALUE ...",
        help="a site's node config, as flower-supernode takes it",
    )
    check.set_defaults(act=_check)
