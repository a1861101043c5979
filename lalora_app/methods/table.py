"""METHODS: the table of all federated LoRA methods, from name to `Method`.

Clipping norm and noise are settings of the run; no method can change them.
"""

from dataclasses import replace

from lalora_app.adapter import factors, parametrisations
from lalora_app.aggregation import (
    beam_pruning,
    fold_into_base,
    new_factors,
    padded_average,
    remembered_change,
    residual_correction,
    task_blocks,
)
from lalora_app.methods import alignment, optimizers, schedule
from lalora_app.methods.filters import (
    binomial,
    identity,
    permuted,
    scaled,
    tail_penalty,
)
from lalora_app.methods.method import Method
from lalora_app.methods.weight_noise import row_scaled_noise

_BOTH = Method(paper="arXiv:2312.17493", trains=schedule.both, syncs=schedule.both)
_ONLY_B = Method(
    paper="arXiv:2403.12313", trains=schedule.only_b, syncs=schedule.only_b, exact=True
)
_BY_ROUND = Method(
    paper="arXiv:2502.01755",
    trains=schedule.alternate_rounds,
    syncs=schedule.alternate_rounds,
    exact=True,
)
_LA_LORA = Method(
    paper="arXiv:2602.19926, one factor is sent per round: B in odd, A in even rounds",
    trains=schedule.alternate_steps,
    syncs=schedule.alternate_rounds,
    postprocess=binomial,
    keeps_client_state=True,
)
_LA_LORA_FULL = replace(
    _LA_LORA, paper="arXiv:2602.19926, Alg. 1", syncs=schedule.both, keeps_client_state=False
)
_HEAD_ONLY = Method(
    paper="baseline: a private head on the frozen model",
    trains=schedule.nothing,
    syncs=schedule.nothing,
    start=parametrisations.keep_head,
    exact=True,
)
_FULL = Method(
    paper="arXiv:1607.00133, on the whole weights of the target layers",
    trains=schedule.whole_weights,
    syncs=schedule.whole_weights,
    exact=True,
    whole=True,
)
_FAIR = replace(_BOTH, paper="arXiv:2411.14961", linear=False)

METHODS: dict[str, Method] = {
    "head-only": _HEAD_ONLY,
    "full": _FULL,
    "dp-lora": _BOTH,
    "ffa-lora": _ONLY_B,
    "rolora": _BY_ROUND,
    "la-lora": _LA_LORA,
    "la-lora-no-filter": replace(_LA_LORA, postprocess=identity),
    "la-lora-scaled": replace(_LA_LORA, postprocess=scaled),
    "la-lora-permuted": replace(_LA_LORA, postprocess=permuted),
    "la-lora-full": _LA_LORA_FULL,
    "la-lora-full-no-filter": replace(_LA_LORA_FULL, postprocess=identity),
    "la-lora-full-scaled": replace(_LA_LORA_FULL, postprocess=scaled),
    "la-lora-full-permuted": replace(_LA_LORA_FULL, postprocess=permuted),
    "flora": replace(
        _BOTH,
        paper="arXiv:2409.05976",
        aggregate=fold_into_base.stack_fold,
        exact=True,
        linear=False,
        moves_base=True,
        heterogeneous=True,
    ),
    "flexlora": replace(
        _BOTH,
        paper="arXiv:2402.11505",
        aggregate=new_factors.product_mean,
        linear=False,
        heterogeneous=True,
    ),
    "hetlora": replace(
        _BOTH,
        paper="arXiv:2401.06432",
        penalty=tail_penalty,
        aggregate=padded_average.padded_mean,
        next_rank=padded_average.pruned_rank,
        linear=False,
        heterogeneous=True,
    ),
    "lora-fair": replace(
        _FAIR, aggregate=residual_correction.corrected_average(residual_correction.ridge_correction)
    ),
    "lora-fair-cosine": replace(
        _FAIR,
        aggregate=residual_correction.corrected_average(residual_correction.cosine_correction),
    ),
    "fedex-lora": replace(
        _BOTH,
        paper="arXiv:2410.09432",
        aggregate=residual_correction.residual_fold,
        exact=True,
        linear=False,
        moves_base=True,
    ),
    "rac-lora": replace(
        _ONLY_B, paper="arXiv:2410.08305", aggregate=fold_into_base.chain_fold, moves_base=True
    ),
    "rac-lora-a": replace(
        _ONLY_B,
        paper="arXiv:2410.08305, the mirrored chain",
        trains=schedule.only_a,
        syncs=schedule.only_a,
        start=fold_into_base.start_with_random_b,
        aggregate=fold_into_base.mirrored_chain_fold,
        moves_base=True,
    ),
    "fedsvd": replace(_ONLY_B, paper="arXiv:2505.12805", aggregate=new_factors.svd_of_mean_b),
    "deer": replace(
        _BY_ROUND,
        paper="arXiv:2410.12926, clipped in the geometry of its noise",
        start=new_factors.start_orthonormal,
        aggregate=new_factors.orthonormal_resting_factor,
    ),
    "galore-dwa": replace(
        _BY_ROUND,
        paper="arXiv:2410.23111, projectors of noised updates",
        start=new_factors.start_orthonormal,
        aggregate=fold_into_base.subspace_fold,
        moves_base=True,
    ),
    "fedrot-lora": replace(_BOTH, paper="arXiv:2602.23638", align=alignment.rotate_to_start),
    "fedsa-lora": replace(
        _BOTH,
        paper="arXiv:2410.01463, local state noised",
        syncs=schedule.only_a,
        finally_syncs=factors.AB,
        keeps_client_state=True,
    ),
    "flat-lora": replace(_BOTH, paper="arXiv:2409.14396", perturb=row_scaled_noise),
    "lora-plus": replace(_BOTH, paper="arXiv:2402.12354", optimizer=optimizers.lora_plus),
    "doppler": replace(_BOTH, paper="arXiv:2408.13460", optimizer=optimizers.low_pass_sgd),
    "dp-fedadamw": replace(_BOTH, paper="arXiv:2602.19945", optimizer=optimizers.unbiased_adamw),
    "dp-fedadamw-full": replace(
        _BOTH,
        paper="arXiv:2602.19945, second moments and the last change from the server",
        start=parametrisations.add_memory,
        optimizer=optimizers.guided_adamw,
        report=optimizers.second_moments,
        aggregate=remembered_change.average_and_remember,
        linear=False,
    ),
    "beamlora": replace(
        _BOTH,
        paper="arXiv:2502.13604",
        start=parametrisations.add_gates,
        effective=parametrisations.gated_factors,
        aggregate=beam_pruning.prune_and_expand,
    ),
    "sd-lora": replace(
        _BOTH,
        paper="arXiv:2501.13198",
        start=parametrisations.add_task_directions,
        width=parametrisations.rank_of_all_tasks,
        effective=parametrisations.factors_with_task_directions,
        aggregate=task_blocks.freeze_direction,
    ),
    "duallora": replace(
        _BOTH,
        paper="arXiv:2411.00623, bases of noised updates",
        start=parametrisations.add_task_basis,
        effective=parametrisations.projected_factors,
        aggregate=task_blocks.freeze_subspace,
        moves_base=True,
    ),
    "losa": replace(
        _BOTH,
        paper="arXiv:2502.14816, masks of public inputs",
        start=parametrisations.add_masks,
        effective=parametrisations.masked_factors,
        calibrates=True,
        moves_base=True,
    ),
}
