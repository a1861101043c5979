"""The table ``rule`` of the run config: numbers that only single methods read."""

from dataclasses import dataclass

from lalora_app.settings.value_rules import count, law, not_negative, positive


@dataclass(frozen=True, kw_only=True)
class MethodNumbers:
    """Numbers of single methods; all other methods ignore them."""

    period: int = count(
        meaning="Rounds between two re-factorisations (`fedsvd`), merges into the base "
        "(`rac-lora`, `rac-lora-a`) or prunings (`beamlora`)."
    )
    rank_decay: float = law(
        "must be in (0, 1]",
        lambda v: 0 < v <= 1,
        meaning="Share γ of a client's rank that `hetlora` keeps when the tail, the other "
        "directions, has become smaller in a round; 1: ranks never change (the paper has 0.99).",
    )
    tail_penalty: float = not_negative(
        meaning="Weight of the penalty on the size of the tail for `hetlora`, with "
        "`rule.rank-decay` below 1; 0 for none."
    )
    fair_weight: float = law(
        "must not be negative (inf: no correction)",
        lambda v: v >= 0,
        meaning="Penalty on the size of the server's correction for `lora-fair` and "
        "`lora-fair-cosine`.",
    )
    residual_rank: int = law(
        "must not be negative",
        lambda v: v >= 0,
        meaning="Largest rank of the residual that `fedex-lora` moves into the base per round; 0: "
        "the whole residual, which makes the mean exact.",
    )
    flat_radius: float = not_negative(
        meaning="Size of the random weight perturbation relative to each row's norm, for "
        "`flat-lora`; 0 for none."
    )
    lr_ratio: float = positive(
        meaning="Learning rate of B divided by that of A, for `lora-plus`; replaces `train.lr-b`."
    )
    filter_order: int = law(
        "must be from 1 to 20",  # 0.05ⁿ, the first step's factor, is a normal float32 number
        lambda v: 1 <= v <= 20,
        meaning="Order of the low-pass filter of `doppler`: first-order filters one after another.",
    )
    global_pull: float = not_negative(
        meaning="Share γ of the last global change that `dp-fedadamw-full` adds in a round, times "
        "the learning rate; 0 for none."
    )
    lr_gate: float = positive(
        meaning="Learning rate of gates (`beamlora`) and magnitudes (`sd-lora`)."
    )
    gate_temperature: float = positive(
        meaning="Temperature of the softmax over the gates of `beamlora`."
    )
    tasks: int = count(
        meaning="Number of tasks for `sd-lora` and `duallora`: blocks of consecutive rounds, on "
        "the same data unless `data.tasks` is the same number."
    )
    task_rank_decay: float = law(
        "must be in (0, 1]",
        lambda v: 0 < v <= 1,
        meaning="Factor of the number of directions that each later task of `sd-lora` trains; 1: "
        "every task has `lora.rank` of them.",
    )
    merge_tolerance: float = law(
        "must be in [0, 1)",
        lambda v: 0 <= v < 1,
        meaning="Largest relative distance at which `sd-lora` replaces the direction of a finished "
        "task by those of earlier tasks; 0: never.",
    )
    sparsity: float = law(
        "must be in [0, 1)",
        lambda v: 0 <= v < 1,
        meaning="Share of the input features that `losa` prunes, by the end of its steps.",
    )
    sparsity_steps: int = count(
        meaning="Steps, evenly over the run, in which `losa` raises its sparsity, most of it in "
        "the first; 1: all of it before round 1 (the paper has 5)."
    )
    sparsity_spread: float = law(
        "must be in [0, 1)",
        lambda v: 0 <= v < 1,
        meaning="Difference from `rule.sparsity` by which `losa` prunes layers more whose inputs "
        "are like those of other layers, and the others less; 0: all alike (the paper has 0.01 to "
        "0.03).",
    )
