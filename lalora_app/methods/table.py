"""METHODS: every federated-LoRA method as one value. Clip and noise belong to the run, not here."""

import difflib
import json
from dataclasses import replace

from lalora_app.adapter import parametrisations
from lalora_app.aggregation import (
    fold_into_base,
    new_factors,
    padded_average,
    residual_correction,
    task_blocks,
)
from lalora_app.methods import alignment, compatibility, optimizers, schedule
from lalora_app.methods.filters import binomial, identity, permuted, scaled
from lalora_app.methods.method import Method
from lalora_app.methods.weight_noise import row_noise
from lalora_app.settings.run_config import Config, ConfigError

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
    paper="arXiv:2602.19926, only the active factor travels",
    trains=schedule.alternate_steps,
    syncs=schedule.alternate_rounds,
    postprocess=binomial,
    keeps_client_state=True,
)
_LA_LORA_FULL = replace(
    _LA_LORA, paper="arXiv:2602.19926, Alg. 1", syncs=schedule.both, keeps_client_state=False
)
_FAIR = replace(_BOTH, paper="arXiv:2411.14961", linear=False)

METHODS: dict[str, Method] = {
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
        aggregate=padded_average.padded_mean,
        linear=False,
        heterogeneous=True,
    ),
    "lora-fair": replace(_FAIR, aggregate=residual_correction.corrected(residual_correction.ridge)),
    "lora-fair-cosine": replace(
        _FAIR, aggregate=residual_correction.corrected(residual_correction.cosine)
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
    "fedsvd": replace(_ONLY_B, paper="arXiv:2505.12805", aggregate=new_factors.refactored),
    "deer": replace(
        _BY_ROUND,
        paper="arXiv:2410.12926, clipped in the geometry of its noise",
        start=new_factors.start_orthonormal,
        aggregate=new_factors.product_space,
    ),
    "galore-dwa": replace(
        _BY_ROUND,
        paper="arXiv:2410.23111, projectors of noised updates",
        start=new_factors.start_orthonormal,
        aggregate=fold_into_base.subspace_fold,
        moves_base=True,
    ),
    "fedrot-lora": replace(_BOTH, paper="arXiv:2602.23638", align=alignment.rotated),
    "fedsa-lora": replace(
        _BOTH,
        paper="arXiv:2410.01463, local state noised",
        syncs=schedule.only_a,
        finally_syncs=schedule.AB,
        keeps_client_state=True,
    ),
    "flat-lora": replace(_BOTH, paper="arXiv:2409.14396", perturb=row_noise),
    "lora-plus": replace(_BOTH, paper="arXiv:2402.12354", optimizer=optimizers.plus),
    "doppler": replace(_BOTH, paper="arXiv:2408.13460", optimizer=optimizers.low_pass),
    "dp-fedadamw": replace(_BOTH, paper="arXiv:2602.19945", optimizer=optimizers.unbiased_adamw),
    "beamlora": replace(
        _BOTH,
        paper="arXiv:2502.13604",
        start=parametrisations.with_gates,
        effective=parametrisations.gated,
        aggregate=task_blocks.prune_and_expand,
    ),
    "sd-lora": replace(
        _BOTH,
        paper="arXiv:2501.13198",
        start=parametrisations.with_directions,
        width=parametrisations.blocks,
        effective=parametrisations.directed,
        aggregate=task_blocks.freeze_direction,
    ),
    "duallora": replace(
        _BOTH,
        paper="arXiv:2411.00623, bases of noised updates",
        start=parametrisations.with_basis,
        effective=parametrisations.projected,
        aggregate=task_blocks.freeze_subspace,
        moves_base=True,
    ),
    "losa": replace(
        _BOTH,
        paper="arXiv:2502.14816, masks of public inputs",
        start=parametrisations.with_masks,
        effective=parametrisations.masked,
        calibrates=True,
        moves_base=True,
    ),
}

# What papers publish and no example-level noise covers: refused by name, with the rule it breaks.
REFUSED = {
    "deer-published": "rule F: its noise is shaped by the other factor, but ΔB is clipped in "
    'another geometry; method="deer" clips where the noise is',
    "galore-raw-gradient": "rules E and I: a projector of a raw gradient is a release without "
    'noise; method="galore-dwa" takes it of noised updates',
    "fedsa-raw-state": "rule E: a factor or head trained without noise on the client reaches "
    'what is sent later; method="fedsa-lora" noises it too',
    "la-lora-published": "rule C: it clips batch means at a median of the private batch; "
    'method="la-lora-full" clips every example at a constant',
    "fedsmooth-lora": "rule E: it starts from a raw gradient and keeps a raw residual",
    "ilora": "rule E: its control variates are made of raw gradients",
    "losa-private": "rule I: masks and ranks of private activations are not noised",
}


def _require_known(name: str) -> None:
    if name in REFUSED:
        raise ConfigError(f"method={json.dumps(name)} is refused by {REFUSED[name]}")
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        known = ", ".join(METHODS)
        raise ConfigError(
            f'method={json.dumps(name)} must be one of {known}; did you mean "{nearest}"?'
        )


def lookup(name: str, local_steps: int) -> Method:
    """Return the method called ``name``, after checking that its rounds train what they send.

    Raises:
        ConfigError: if there is no such method, it is one that gives no guarantee, or
            ``local_steps`` is too few for its schedule.
    """
    _require_known(name)
    method = METHODS[name]
    for t in (1, 2):  # the longest period of any schedule
        if not method.syncs(t) <= schedule.trained(method.trains, t, local_steps):
            raise ConfigError(
                f"train.local-steps={local_steps} must be at least 2 for method {name}: "
                "a round must train every factor that it sends"
            )
    return method


def method_of(config: Config) -> Method:
    """Return a run's method, after checking that the rest of the config goes with it.

    Raises:
        ConfigError: naming the rule that the combination breaks.
    """
    method, ranks = lookup(config.method, config.train.local_steps), config.lora.ranks
    if ranks != "none" and not method.heterogeneous:
        able = ", ".join(name for name, entry in METHODS.items() if entry.heterogeneous)
        raise ConfigError(
            f'lora.ranks="{ranks}" must be "none" for method {config.method}, whose factors have '
            f"one rank; these take several: {able}"
        )
    if config.robust != "none" and not method.linear:
        raise ConfigError(
            f'robust="{config.robust}" must be "none" for method {config.method}, whose server '
            "rule is not a mean"
        )
    compatibility.check(config, linear=method.linear)
    return method


def checked_rank(rank: object, config: Config) -> int:
    """Return a client's rank, which both sides check: neither trusts the other's word.

    Raises:
        ConfigError: if the run has no room for it, or its method wants one rank for all.
    """
    largest = config.lora.rank
    if type(rank) is not int or not 1 <= rank <= largest:
        raise ConfigError(f"rank={rank!r} must be 1 to lora.rank={largest}")
    if rank != largest and not method_of(config).heterogeneous:
        raise ConfigError(f"rank={rank} must be lora.rank={largest} for method {config.method}")
    return rank
