"""Each mutant breaks the privacy in one line of a copy of the package; its test must turn red."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.pytest_server import PytestServer

ROOT = Path(__file__).resolve().parents[2]
# pytest's exit codes; all others mean that no test ran.
PASSED, FAILED = 0, 1


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    test: str


MUTANTS = {
    "batch-mean clip": Mutant(
        "private_step/mechanism.py",
        "    scales = CLIPPINGS[clipping](grads.norms(), clip_norm)\n",
        "    means = [grad.mean(0).norm() for grad in grads.dense().values()]\n"
        "    norms = torch.full_like(grads.norms(), float(torch.stack(means).norm()))\n"
        "    scales = CLIPPINGS[clipping](norms, clip_norm)\n",
        "tests/private_step/test_mechanism.py::test_clipping_is_flat_over_all_tensors_of_an_example",
    ),
    "per-tensor clip": Mutant(
        "private_step/gradients.py",
        "        return _norms(torch.column_stack([block.norms() for block in self.blocks]))\n",
        "        return torch.column_stack([block.norms() for block in self.blocks]).amax(1)\n",
        "tests/private_step/test_mechanism.py::test_the_flat_clip_is_neither_per_tensor_nor_of_the_batch",
    ),
    "automatic clipping without the division": Mutant(
        "private_step/mechanism.py",
        "    scales = clip_norm * CLIP_MARGIN / (norms + AUTOMATIC_SHIFT)\n",
        "    scales = clip_norm * CLIP_MARGIN * torch.ones_like(norms)\n",
        "tests/private_step/test_mechanism.py::test_no_example_moves_the_sum_by_more_than_the_clip_norm",
    ),
    "one-position heads left out of the norm": Mutant(
        "private_step/gradients.py",
        "        return _norms(self.g, torch.float64) * _norms(self.x, torch.float64)\n",
        "        return torch.zeros_like(_norms(self.g))\n",
        "tests/private_step/test_kernels.py::test_no_example_moves_the_float32_sum_by_more_than_the_clip_norm",
    ),
    "whole weights: products of two different rows left out of the norm": Mutant(
        "private_step/gradients.py",
        "    squared = torch.linalg.vecdot((g @ g.mT).flatten(1), (x @ x.mT).flatten(1))\n",
        "    squared = (g.square().sum(2) * x.square().sum(2)).sum(1)\n",
        "tests/private_step/test_whole_weights.py::test_no_example_moves_the_sum_by_more_than_the_clip_norm",
    ),
    "whole weights: the norm of the batch's mean": Mutant(
        "private_step/gradients.py",
        "    return _norms((g.mT @ x).flatten(1))\n",
        "    return _norms((g.mT @ x).mean(0).flatten()).expand(len(g))\n",
        "tests/private_step/test_whole_weights.py::test_no_example_moves_the_sum_by_more_than_the_clip_norm",
    ),
    "whole weights: rounding of rows that cancel ignored": Mutant(
        "private_step/gradients.py",
        "            found.append(norms + _ROUNDING * torch.finfo(self._sum_dtype).eps * lengths)\n",
        "            found.append(norms)\n",
        "tests/private_step/test_whole_weights.py::test_rows_that_nearly_cancel_are_not_clipped_to_more_than_the_clip_norm",
    ),
    "gradient of an example counted twice": Mutant(
        "private_step/tape.py",
        "beta=0.0 if first else 1.0, alpha=scale)",
        "beta=0.0 if first else 1.0, alpha=2 * scale)",
        "tests/private_step/test_kernels.py::test_a_lora_layer_of_any_leading_shape_and_number_of_calls",
    ),
    "per-window clip": Mutant(
        "private_step/tape.py",
        "        return x.reshape(self._examples, -1, x.shape[-1])\n",
        "        return x.reshape(x.shape[0], -1, x.shape[-1])\n",
        "tests/private_step/test_per_example.py::test_an_image_is_clipped_as_one_and_not_by_its_windows",
    ),
    "clip per view": Mutant(
        "private_step/views.py",
        "    return replace(batch, inputs=torch.from_numpy(np.stack(shown)), views=drawn.shape[1])\n",
        "    labels = batch.labels.repeat_interleave(drawn.shape[1])\n"
        "    return replace(batch, inputs=torch.from_numpy(np.stack(shown)), labels=labels)\n",
        "tests/private_step/test_views.py::test_no_image_moves_the_sum_by_more_than_the_clip_norm",
    ),
    "noise skipped": Mutant(
        "private_step/mechanism.py",
        "alpha=noise_std)",
        "alpha=0.0)",
        "tests/private_step/test_mechanism.py::test_add_noise_has_the_given_deviation_and_divides_by_the_expected_batch",
    ),
    "noise scaled by 2/3": Mutant(
        "private_step/mechanism.py",
        "alpha=noise_std)",
        "alpha=2 / 3 * noise_std)",
        "tests/private_step/test_mechanism.py::test_add_noise_has_the_given_deviation_and_divides_by_the_expected_batch",
    ),
    "noise halved": Mutant(
        "private_step/mechanism.py",
        "alpha=noise_std)",
        "alpha=noise_std / 2)",
        "tests/private_step/test_mechanism.py::test_add_noise_has_the_given_deviation_and_divides_by_the_expected_batch",
    ),
    "average before noise, its noise divided twice": Mutant(
        "private_step/mechanism.py",
        "    noised = torch._foreach_add(totals, shaped, alpha=noise_std)\n",
        "    totals = torch._foreach_div(totals, expected_batch)\n"
        "    shaped = torch._foreach_div(shaped, expected_batch)\n"
        "    noised = torch._foreach_add(totals, shaped, alpha=noise_std / expected_batch)\n"
        "    torch._foreach_mul_(noised, expected_batch)\n",
        "tests/private_step/test_mechanism.py::test_add_noise_has_the_given_deviation_and_divides_by_the_expected_batch",
    ),
    "the same noise in every step": Mutant(
        "private_step/mechanism.py",
        "        return torch.from_numpy(rng.standard_normal(size)).to(like)\n",
        "        rng = np.random.default_rng(0)\n"
        "        return torch.from_numpy(rng.standard_normal(size)).to(like)\n",
        "tests/private_step/test_mechanism.py::test_every_entry_of_every_tensor_has_noise_of_its_own",
    ),
    "no noise on one factor": Mutant(
        "private_step/mechanism.py",
        "    noised = torch._foreach_add(totals, shaped, alpha=noise_std)\n",
        '    shaped = [s * (".lora_A." not in n) for n, s in zip(sums, shaped, strict=True)]\n'
        "    noised = torch._foreach_add(totals, shaped, alpha=noise_std)\n",
        "tests/private_step/test_mechanism.py::test_an_empty_batch_is_pure_noise_and_uses_up_a_reservation",
    ),
    "noise without the clip norm": Mutant(
        "private_step/step.py",
        "return z * clip_norm if z > 0 else 0.0",
        "return z",
        "tests/private_step/test_mechanism.py::test_an_empty_batch_is_pure_noise_and_uses_up_a_reservation",
    ),
    "gates differentiated in the batch's mean": Mutant(
        "private_step/reparametrised_engine.py",
        "        (pulled,) = torch.vmap(pullback)(grads)\n",
        "        grads = {n: g.mean(0, keepdim=True).expand_as(g) for n, g in grads.items()}\n"
        "        (pulled,) = torch.vmap(pullback)(grads)\n",
        "tests/adapter/test_parametrisations.py::test_every_example_has_the_gradient_of_its_own_loss_through_the_parametrisation",
    ),
    "realised batch size": Mutant(
        "private_step/step.py",
        "    expected = q * len(data) if expected_batch is None else expected_batch\n",
        "    expected = max(len(indices), 1)\n",
        "tests/private_step/test_mechanism.py::test_the_sum_is_divided_by_the_expected_and_not_by_the_realised_batch",
    ),
    "a step not counted": Mutant(
        "client/limits.py",
        "    return Release(q, noise_multiplier, steps), _limits(config, site, planned)\n",
        "    return Release(q, noise_multiplier, steps - 1), _limits(config, site, planned)\n",
        "tests/whole_app/test_contract.py::test_the_ledger_counts_every_step_of_every_client[la-lora]",
    ),
    "a step not counted, and the guard gone": Mutant(
        "privacy/ledger_entries.py",
        "    numbers = (release.sampling_rate, release.noise_multiplier, release.count)\n",
        "    count = max(release.count - 1, 1)\n"
        "    numbers = (release.sampling_rate, release.noise_multiplier, count)\n",
        "tests/whole_app/test_contract.py::test_the_ledger_counts_every_step_of_every_client[la-lora]",
    ),
    "more steps than reserved": Mutant(
        "privacy/ledger.py",
        "        if self._left == 0:\n",
        "        if False:\n",
        "tests/private_step/test_mechanism.py::test_a_used_up_reservation_refuses_before_anything_is_drawn",
    ),
    "ledger written after training": Mutant(
        "client/requests.py",
        "    reservation = reserve(config, site, request, len(current.data))\n"
        "    clock.append(time.monotonic())\n"
        "    streams = _streams(config, site.client, request.attempt)\n"
        "    result = run_local_steps(current, start, reservation, streams)\n",
        "    from lalora_app.privacy.accounting import Release\n"
        "    rate = config.train.rate(len(current.data))\n"
        "    reservation = Reservation(Release(rate, 1.0, config.train.local_steps))\n"
        "    clock.append(time.monotonic())\n"
        "    streams = _streams(config, site.client, request.attempt)\n"
        "    result = run_local_steps(current, start, reservation, streams)\n"
        "    reserve(config, site, request, len(current.data))\n",
        "tests/client/test_kill.py::test_the_ledger_never_under_reports_when_the_client_is_killed",
    ),
    "shared noise: a part of a sum without a line in the ledger": Mutant(
        "client/requests.py",
        "    reservation = reserve(config, site, request, len(current.data), part.cohort, part.uid)\n",
        "    from lalora_app.privacy.accounting import Release\n"
        "    run = lattice.constants\n"
        "    reservation = Reservation(Release(run.sampling_rate, run.noise_multiplier, 1))\n",
        "tests/secagg/test_shared_runs.py::test_every_line_of_the_ledgers_has_two_multipliers",
    ),
    "ledger not committed": Mutant(
        "privacy/ledger.py",
        '            db.execute("COMMIT")\n',
        "            _OPEN.append(db)  # committed when the process ends, if it ends well\n",
        "tests/privacy/test_ledger.py::test_a_row_is_committed_when_reserve_returns",
    ),
    "class sums without noise": Mutant(
        "client/class_sums.py",
        "        reservation=reservation,\n        clip_norm=LENGTH,\n",
        '        reservation=(setattr(reservation, "noise_multiplier", 0.0), reservation)[1],\n'
        "        clip_norm=LENGTH,\n",
        "tests/client/test_class_sums.py::test_every_entry_has_noise_of_the_releases_size",
    ),
    "class sums that no ledger counts": Mutant(
        "client/limits.py",
        "    return site.ledger.reserve(",
        "    if config.sums_classes(request.round):\n"
        "        return Reservation(release)\n"
        "    return site.ledger.reserve(",
        "tests/whole_app/test_head_start.py::test_the_release_is_on_the_ledger_before_its_noise_is_drawn",
    ),
    "class sums of features that are not scaled": Mutant(
        "client/class_sums.py",
        "        clip_norm=LENGTH,\n",
        "        clip_norm=10 * LENGTH,\n",
        "tests/client/test_class_sums.py::test_one_example_moves_the_sums_by_at_most_one_whatever_the_others_are",
    ),
    "shuffled batches": Mutant(
        "private_step/mechanism.py",
        "    return np.flatnonzero(rng.random(size) < rate)\n",
        "    return np.sort(rng.permutation(size)[: round(rate * size)])\n",
        "tests/private_step/test_mechanism.py::test_batch_sizes_are_binomial_and_not_fixed",
    ),
    "empty batches skipped": Mutant(
        "private_step/step.py",
        "    noise_std = noise_std_of(reservation, clip_norm)\n    expected =",
        "    noise_std = noise_std_of(reservation, clip_norm)\n"
        "    if not len(indices):\n"
        "        return NoisedGrads(sums)\n    expected =",
        "tests/private_step/test_mechanism.py::test_an_empty_batch_is_pure_noise_and_uses_up_a_reservation",
    ),
    "non-finite examples scaled": Mutant(
        "private_step/mechanism.py",
        "        grads = grads.zero_examples(dropped)\n",
        "        pass\n",
        "tests/private_step/test_mechanism.py::test_a_non_finite_example_adds_exactly_nothing_and_leaves_the_others",
    ),
    "train loss in the reply": Mutant(
        "wire/messages.py",
        '        metrics = MetricRecord({"round": self.round, "epsilon": self.epsilon, **sizes})\n',
        '        metrics = MetricRecord({"round": self.round, "epsilon": self.epsilon, "loss": 0.5})\n',
        "tests/whole_app/test_reply_contents.py::test_nothing_but_the_allowed_keys_leaves_a_client[False]",
    ),
    "exception text in the reply": Mutant(
        "client/answers.py",
        "        return messages.refusal(refusal_key(error, context.node_config))\n",
        "        return RecordDict({messages.CONFIG: messages.ConfigRecord({'refusal': str(error)})})\n",
        "tests/whole_app/test_reply_contents.py::test_every_exception_becomes_a_fixed_refusal",
    ),
    "trained again after the site worker has died": Mutant(
        "site_worker/hand_over.py",
        "        return exchange(connection, name, message, context)\n",
        "        try:\n"
        "            return exchange(connection, name, message, context)\n"
        "        except WorkerLostError:\n"
        "            return own(message, context)\n",
        "tests/site_worker/test_handshake.py::test_a_site_worker_that_dies_with_the_message_is_an_error_and_nothing_is_done_again[3]",
    ),
    "another user at the site worker's socket": Mutant(
        "site_worker/handshake.py",
        "    if user != os.geteuid():\n",
        "    if False:\n",
        "tests/site_worker/test_handshake.py::test_the_process_at_the_other_end_must_be_this_users",
    ),
    "padded to the longest of the batch": Mutant(
        "data/encoding.py",
        "self.batch(part, width) for part, width in self.parts(indices, size)",
        "self.batch(part) for part, _ in self.parts(indices, size)",
        "tests/data/test_encoding.py::test_how_far_a_text_is_padded_follows_from_it_alone",
    ),
    "a head's norm in float32": Mutant(
        "private_step/gradients.py",
        "        return _norms(self.g, torch.float64) * _norms(self.x, torch.float64)\n",
        "        return _norms(self.g) * _norms(self.x)\n",
        "tests/private_step/test_mechanism.py::test_no_head_of_any_size_exceeds_the_clip_norm",
    ),
    "columns of the server's choice": Mutant(
        "client/site.py",
        "    check_columns(config, node)\n    rank",
        "    rank",
        "tests/client/test_site.py::test_a_run_with_other_columns_is_refused_before_any_data_is_read",
    ),
    "classes of the server's choice": Mutant(
        "client/own_data.py",
        "    if set(data.class_names) != set(own):\n",
        "    if not data.class_names:\n",
        "tests/client/test_site.py::test_a_run_with_other_classes_is_refused_before_any_data_is_read",
    ),
    "shared rows counted as rows of examples": Mutant(
        "private_step/attach.py",
        "    if x.shape[0] % examples:\n",
        "    if (x.numel() // x.shape[-1]) % examples:\n",
        "tests/private_step/test_shared_rows.py::test_rows_that_are_not_expanded_are_refused_also_where_they_divide",
    ),
    "hidden states of other weights used": Mutant(
        "blocks/with_states.py",
        'f"{self.prefix.fingerprint} {self.dtype}',
        'f"{self.dtype}',
        "tests/blocks/test_prefix.py::test_states_of_other_weights_are_not_used",
    ),
    "hidden states of another example used": Mutant(
        "blocks/with_states.py",
        "            key.update(row[: self.data.length(index) or None].tobytes())\n",
        "            key.update(bytes([self.data.length(index)]))\n",
        "tests/blocks/test_prefix.py::test_states_of_another_example_are_not_used",
    ),
    "resting factor steps": Mutant(
        "client/local_round.py",
        "        parameter.grad = gradients.get(name)\n",
        "        parameter.grad = gradients.get(name, torch.zeros_like(parameter))\n",
        "tests/whole_app/test_local_steps.py::test_a_resting_factor_and_its_moments_stay_bit_identical",
    ),
    "shared noise: σ/h² in place of σ²/h": Mutant(
        "shared_noise/seeded.py",
        "seed, lattice.noise_std * math.sqrt(fraction), lattice",
        "seed, lattice.noise_std * float(fraction), lattice",
        "tests/shared_noise/test_seeded.py::test_drawn_noise_has_the_variance_of_the_formula_and_never_less_than_promised",
    ),
    "shared noise: the attacker's own share counted": Mutant(
        "shared_noise/shares.py",
        "        return self.clients - 1 - self.colluding\n",
        "        return self.clients - self.colluding\n",
        "tests/shared_noise/test_shares.py::test_the_counted_shares_have_the_promised_variance_whoever_is_missing",
    ),
    "shared noise: colluding clients counted": Mutant(
        "shared_noise/shares.py",
        "        return self.clients - 1 - self.colluding\n",
        "        return self.clients - 1\n",
        "tests/shared_noise/test_shares.py::test_the_counted_shares_have_the_promised_variance_whoever_is_missing",
    ),
    "shared noise: a needed component is revealed": Mutant(
        "shared_noise/shares.py",
        "return bisect_left(self.levels, missing)",
        "return max(bisect_left(self.levels, missing) - 1, 0)",
        "tests/shared_noise/test_shares.py::test_the_counted_shares_have_the_promised_variance_whoever_is_missing",
    ),
    "shared noise: a component is taken off twice": Mutant(
        "shared_noise/seeded.py",
        "            rest -= to_words(component(known, number, lattice), lattice.word)\n",
        "            rest -= to_words(2 * component(known, number, lattice), lattice.word)\n",
        "tests/shared_noise/test_seeded.py::test_the_sum_is_exact_with_and_without_drop_outs_and_after_the_removal",
    ),
    "shared noise: a seed revealed twice is accepted": Mutant(
        "shared_noise/seeded.py",
        "    if len(set(revealed.values())) < len(revealed):\n",
        "    if False:\n",
        "tests/shared_noise/test_seeded.py::test_too_many_missing_or_seeds_given_twice_are_refused",
    ),
    "shared noise: a client's sum without its share": Mutant(
        "private_step/step.py",
        "    return to_lattice(flat, lattice.unit) + noise\n",
        "    return to_lattice(flat, lattice.unit)\n",
        "tests/private_step/test_lattice_sum.py::test_the_share_of_the_noise_is_added_and_has_the_variance_of_its_components",
    ),
    "shared noise: less noise than on the ledger": Mutant(
        "private_step/step.py",
        "    if (run.sampling_rate, run.noise_multiplier) != (\n",
        "    if False and (run.sampling_rate, run.noise_multiplier) != (\n",
        "tests/private_step/test_lattice_sum.py::test_another_rate_or_noise_than_the_ledgers_is_an_error_and_takes_nothing",
    ),
    "shared noise: a sum that no release counts": Mutant(
        "private_step/step.py",
        "    reservation.take()\n    indices = poisson_batch(len(data), run.sampling_rate, sampling)\n",
        "    indices = poisson_batch(len(data), run.sampling_rate, sampling)\n",
        "tests/private_step/test_lattice_sum.py::test_an_empty_batch_is_noise_alone_and_uses_up_the_reservation",
    ),
    "shared noise: the sensitivity of fewer entries": Mutant(
        "private_step/step.py",
        "    if flat.size != noise.size:\n",
        "    if flat.size < noise.size:\n",
        "tests/private_step/test_lattice_sum.py::test_an_upload_of_another_size_than_the_sensitivity_counts_is_an_error",
    ),
    "shared noise: peers that nobody checks": Mutant(
        "client/shared_round.py",
        "    _check_peers(asked, attempt.state)\n",
        "",
        "tests/secagg/test_pinned_runs.py::test_keys_that_the_server_has_exchanged_are_refused_by_every_site",
    ),
    "shared noise: peers with another run config": Mutant(
        "client/shared_round.py",
        "    return digest_of(public_constants(config))\n",
        "    return digest_of({})\n",
        "tests/secagg/test_pinned_runs.py::test_sites_that_know_each_other_complete_a_run",
    ),
    "shared noise: a cohort that no policy checks": Mutant(
        "client/shared_round.py",
        "    asked.site.policy.check_cohort(cohort.honest, colluding)\n",
        "",
        "tests/secagg/test_pinned_runs.py::test_a_site_that_asks_for_more_honest_shares_refuses",
    ),
    "shared noise: an interrupted attempt is repeated": Mutant(
        "server_app.py",
        "        point = after_interruption(config, method, point, folder)\n",
        "        pass\n",
        "tests/secagg/test_shared_runs.py::test_a_resumed_run_does_not_repeat_the_attempt",
    ),
    "shared noise: the chain gives component 0": Mutant(
        "shared_noise/seeded.py",
        "    return (needed, *_chain(first, cohort.removable))\n",
        "    return (hashlib.sha256(first).digest(), *_chain(first, cohort.removable))\n",
        "tests/shared_noise/test_seeded.py::test_a_revealed_seed_gives_the_later_ones_and_is_bound_by_the_commitment",
    ),
    "shared noise: a threshold that lying lists get around": Mutant(
        "shared_noise/shares.py",
        "if (clients - t) ** 2 < t - 1 - colluding",
        "if (clients - t) ** 2 <= t - 1 - colluding",
        "tests/shared_noise/test_shares.py::test_the_threshold_is_the_smallest_that_lies_cannot_get_around",
    ),
    "shared noise: masks that do not depend on the round's constants": Mutant(
        "client/shared_round.py",
        "to_words(integers, lattice.word), context)",
        "to_words(integers, lattice.word))",
        "tests/secagg/test_shared_runs.py::test_a_round_is_the_step_of_one_client_with_the_whole_noise",
    ),
    "shared noise: the same keys for two releases": Mutant(
        "privacy/ledger.py",
        "            if unchanged and db.execute(_NAMED, (entry.uid,)).fetchone():\n",
        "            if False:\n",
        "tests/privacy/test_two_epsilons.py::test_a_name_is_used_for_one_release",
    ),
    "shared noise: one seed for all components": Mutant(
        "shared_noise/seeded.py",
        "    if len(seeds) != needed or len(set(seeds)) != needed:\n",
        "    if len(seeds) != needed:\n",
        "tests/shared_noise/test_seeded.py::test_a_share_needs_one_seed_of_its_own_per_component",
    ),
    "shared noise: sensitivity without √d": Mutant(
        "shared_noise/lattice.py",
        "return self.constants.clip_norm / self.unit + math.sqrt(self.constants.entries)",
        "return self.constants.clip_norm / self.unit",
        "tests/shared_noise/test_lattice.py::test_one_example_moves_a_rounded_sum_by_at_most_the_sensitivity",
    ),
    "shared noise: sensitivity without √d, worked example": Mutant(
        "shared_noise/lattice.py",
        "return self.constants.clip_norm / self.unit + math.sqrt(self.constants.entries)",
        "return self.constants.clip_norm / self.unit",
        "tests/shared_noise/test_lattice.py::test_the_root_of_the_number_of_entries_is_needed",
    ),
    "shared noise: one rounding for two clients": Mutant(
        "shared_noise/rounding.py",
        "    exponent = (summands - 1) * math.log1p(theta)\n",
        "    exponent = (summands - 1) / 4 * math.log1p(theta)\n",
        "tests/shared_noise/test_rounding.py::test_the_sum_is_a_randomly_rounded_gaussian_up_to_the_bound",
    ),
    "shared noise: rounding of unequal variances underrated": Mutant(
        "shared_noise/lattice.py",
        "float(min(cohort.fractions))",
        "float(max(cohort.fractions))",
        "tests/shared_noise/test_lattice.py::test_little_noise_among_many_clients_gets_a_finer_unit",
    ),
    "shared noise: z/√h for an upload alone": Mutant(
        "shared_noise/shares.py",
        "multiplier / math.sqrt(self.honest_if_all_upload)",
        "multiplier / math.sqrt(self.honest)",
        "tests/shared_noise/test_shares.py::test_an_upload_alone_keeps_what_the_fewest_components_give",
    ),
    "shared noise: the mean of fewer units": Mutant(
        "shared_noise/lattice.py",
        "(lattice.unit / divisor)",
        "(lattice.unit / divisor * (1 - 2.0**-12))",
        "tests/shared_noise/test_one_client.py::test_clients_with_shared_noise_equal_one_client_with_all_data",
    ),
    "secure aggregation: the missing clients counted from the server's lists": Mutant(
        "secagg/client.py",
        "state.cohort.needed(len(state.mask_keys) - len(arrived))",
        "state.cohort.needed(len(state.seed_shares) - len(arrived))",
        "tests/secagg/test_noise_of_a_sum.py::test_a_client_counts_who_is_missing_by_itself",
    ),
    "secure aggregation: the seed of component 0 shared": Mutant(
        "secagg/client.py",
        "*seeds[1:])",
        "seeds[0], *seeds[2:])",
        "tests/secagg/test_noise_of_a_sum.py::test_the_first_seed_is_kept_and_the_others_are_deleted_after_the_upload",
    ),
    "secure aggregation: two answers to unmask": Mutant(
        "secagg/client.py",
        "    close(state, context)  # first",
        "    # close(state, context)  # first",
        "tests/secagg/test_noise_of_a_sum.py::test_a_client_told_two_lists_answers_once",
    ),
    "secure aggregation: the threshold of shared noise too small": Mutant(
        "shared_noise/shares.py",
        "if (clients - t) ** 2 < t - 1 - colluding",
        "if True",
        "tests/secagg/test_noise_of_a_sum.py::test_two_numbers_of_missing_clients_cannot_both_be_answered",
    ),
    "secure aggregation: shares without random coefficients": Mutant(
        "secagg/shamir.py",
        "[_lanes(secrets.token_bytes(ends[-1])) for _ in range(needed - 1)]",
        "[0] * (needed - 1)",
        "tests/secagg/test_shamir.py::test_each_split_draws_new_coefficients",
    ),
    "secure aggregation: a share holds the secret": Mutant(
        "secagg/client.py",
        "split_into_shares(parts, state.mask_keys, state.threshold)",
        "split_into_shares(parts, state.mask_keys, 1)",
        "tests/secagg/test_noise_of_a_sum.py::test_a_secret_of_a_client_takes_as_many_holders_as_the_attempt_needs",
    ),
    "secure aggregation: one share fewer opens a secret": Mutant(
        "secagg/shamir.py",
        "for _ in range(needed - 1)]",
        "for _ in range(max(needed - 2, 0))]",
        "tests/secagg/test_shamir.py::test_fewer_shares_than_needed_do_not_give_the_secret",
    ),
    "secure aggregation: the blocks of a secret with one polynomial": Mutant(
        "secagg/shamir.py",
        "secrets.token_bytes(ends[-1])",
        "secrets.token_bytes(_BYTES) * blocks",
        "tests/secagg/test_shamir.py::test_each_split_draws_new_coefficients",
    ),
    "secure aggregation: the secret of a pair without its public keys": Mutant(
        "secagg/masks.py",
        "(_DOMAIN, *publics)",
        "(_DOMAIN,)",
        "tests/secagg/test_masks.py::test_two_public_keys_with_one_result_have_two_secrets",
    ),
    "secure aggregation: two secrets with one polynomial": Mutant(
        "secagg/shamir.py",
        "secrets.token_bytes(ends[-1])",
        "bytes(range(ends[-1]))",
        "tests/secagg/test_shamir.py::test_each_split_draws_new_coefficients",
    ),
    "secure aggregation: two pairs with one secret have one mask": Mutant(
        "secagg/masks.py",
        "(base64.urlsafe_b64decode(secret), *numbers, context)",
        "(base64.urlsafe_b64decode(secret), context)",
        "tests/secagg/test_masks.py::test_the_mask_of_a_pair_depends_on_its_numbers_and_the_context",
    ),
    "secure aggregation: shares for another directory": Mutant(
        "secagg/upload.py",
        '    check(seeds[end:] == state.directory, "all clients must have the same directory of keys")\n',
        "",
        "tests/secagg/test_stages.py::test_clients_with_different_directories_refuse_to_train",
    ),
    "secure aggregation: a noise seed that is not verified": Mutant(
        "secagg/noise_seeds.py",
        "    if seeded.commitment(seed, number, cohort) != committed:",
        "    if False:",
        "tests/secagg/test_noise_of_a_sum.py::test_a_client_with_a_wrong_commitment_keeps_its_noise_alone",
    ),
    "secure aggregation: two vectors under the same masks": Mutant(
        "secagg/upload.py",
        '        check(record_name(state.attempt) not in records, "an attempt masks one vector")\n',
        "",
        "tests/secagg/test_noise_of_a_sum.py::test_an_attempt_masks_one_vector",
    ),
    "secure aggregation: an attempt that trains twice": Mutant(
        "secagg/client_state.py",
        "    check(state.attempt > last, ",
        "    check(state.attempt > 0, ",
        "tests/secagg/test_stages.py::test_an_attempt_that_began_to_train_never_begins_again",
    ),
    "secure aggregation: a later stage that fails spoils the present one": Mutant(
        "client/answers.py",
        "        content[name] = found[messages.CONFIG]\n",
        "        content[name] = content[messages.CONFIG] = found[messages.CONFIG]\n",
        "tests/secagg/test_stages.py::test_a_stage_that_fails_changes_no_other_part_of_its_message",
    ),
    "shared noise: opened uploads composed with the noise of the sums": Mutant(
        "privacy/ledger.py",
        "_check_alone_limit([*releases_alone(lines), *later], plan, alone, alone_limit)",
        "_check_alone_limit([*releases_of(lines), *later], plan, alone, alone_limit)",
        "tests/privacy/test_two_epsilons.py::test_the_limit_alone_holds_over_all_runs_each_release_with_its_own_noise",
    ),
    "shared noise: the next upload counted with the noise of the sum": Mutant(
        "privacy/ledger.py",
        "    opened = plan if alone is None else replace(plan, noise_multiplier=alone)\n",
        "    opened = plan\n",
        "tests/privacy/test_two_epsilons.py::test_a_run_that_would_exceed_the_limit_alone_later_is_refused_at_its_first_round",
    ),
    "shared noise: the noise of an upload alone is not written": Mutant(
        "privacy/ledger_entries.py",
        "(*row, *numbers, entry.uid, entry.alone, entry.part, entry.seeded)",
        "(*row, *numbers, entry.uid, None, entry.part, entry.seeded)",
        "tests/privacy/test_two_epsilons.py::test_the_file_holds_both_multipliers_and_none_for_own_noise",
    ),
    "shared noise: more noise for an upload than for its sum": Mutant(
        "privacy/ledger_entries.py",
        "not 0 <= alone <= release.noise_multiplier",
        "not 0 <= alone",
        "tests/privacy/test_two_epsilons.py::test_an_upload_has_no_more_noise_than_its_sum",
    ),
    "shared noise: a site without conditions takes part": Mutant(
        "privacy/policy.py",
        "        if config.privacy.shared:\n",
        "        if False:\n",
        "tests/privacy/test_shared_policy.py::test_without_the_table_a_site_refuses_and_a_simulated_client_allows",
    ),
    "shared noise: own data treated as simulated data": Mutant(
        "privacy/policy.py",
        "SharedNoise(Limit(math.inf, limit.delta)) if simulated else None\n",
        "SharedNoise(Limit(math.inf, limit.delta))\n",
        "tests/privacy/test_shared_policy.py::test_without_the_table_a_site_refuses_and_a_simulated_client_allows",
    ),
    "shared noise: any number of honest shares": Mutant(
        "privacy/shared_policy.py",
        "        if honest < self.min_honest:\n",
        "        if honest < 1:\n",
        "tests/privacy/test_shared_policy.py::test_an_attempt_with_too_few_honest_shares_is_refused",
    ),
    "pinned peers: one site counted as two": Mutant(
        "secagg/peers.py",
        "identities.count(entry.identity) == 1\n",
        "identities.count(entry.identity) >= 1\n",
        "tests/secagg/test_peers.py::test_an_identity_that_occurs_twice_is_refused",
    ),
    "pinned peers: a made-up client accepted": Mutant(
        "secagg/peers.py",
        "        known = entry.identity == own or entry.identity in peers\n",
        "        known = True\n",
        "tests/secagg/test_peers.py::test_an_identity_that_is_not_pinned_is_refused",
    ),
    "pinned peers: signatures not verified": Mutant(
        "secagg/peers.py",
        "        signed = _is_signed(entry.identity, entry.signature, message)\n",
        "        signed = len(message) > 0\n",
        "tests/secagg/test_peers.py::test_any_changed_byte_of_an_entry_is_refused",
    ),
    "pinned peers: keys of another attempt accepted": Mutant(
        "secagg/peers.py",
        "for number in (attempt, client))",
        "for number in (client,))",
        "tests/secagg/test_peers.py::test_signatures_of_another_run_attempt_or_settings_are_refused",
    ),
    "pinned peers: fields signed without their lengths": Mutant(
        "secagg/peers.py",
        'len(field).to_bytes(8, "big") + field for',
        "field for",
        "tests/secagg/test_peers.py::test_bytes_moved_from_one_field_to_the_next_are_refused",
    ),
    "a site's signing key is replaced": Mutant(
        "site_files/peer_key.py",
        "        os.link(part, path)  #",
        "        os.replace(part, path)  #",
        "tests/site_files/test_peer_key.py::test_a_key_is_never_replaced",
    ),
    "audit of shared noise: the noise of colluding clients stays": Mutant(
        "audit/shared_step.py",
        "        for own in seeds[1 : 2 + self.cohort.colluding]:\n",
        "        for own in seeds[1:2]:\n",
        "tests/audit/test_shared_audit.py::test_the_attacker_is_left_with_the_needed_components_of_the_others_and_no_more",
    ),
    "audit of shared noise: nothing is removed from the sum": Mutant(
        "audit/shared_step.py",
        "        rest = without_excess(total, revealed, answered, lattice)\n",
        "        rest = without_excess(total, {}, answered, lattice)\n",
        "tests/audit/test_shared_audit.py::test_the_real_sum_has_the_promised_noise_and_proves_no_more_than_is_promised",
    ),
    "audit of shared noise: the second step at the shared model": Mutant(
        "audit/broken_shares.py",
        "np.where(position > 0.5, 1.0, -1.0)",
        "np.where(position > 0.5, 0.0, 0.0)",
        "tests/audit/test_shared_audit.py::test_two_local_steps_show_one_client_with_the_noise_of_one_share",
    ),
    "audit: an upload alone judged by the promise of the sum": Mutant(
        "audit/findings.py",
        "[self.epsilon_upper if r.promise is None else r.promise for r in self.rows]",
        "[self.epsilon_upper for _ in self.rows]",
        "tests/audit/test_shared_audit.py::test_a_row_with_a_promise_of_its_own_is_judged_by_it",
    ),
    "an example of another task": Mutant(
        "data/task_division.py",
        "    return examples.take([row for row, place in enumerate(places) if tasks[place] == task])\n",
        "    return examples\n",
        "tests/whole_app/test_tasks.py::test_a_round_trains_on_the_examples_of_its_own_task_only",
    ),
    "seeded noise counted as secret": Mutant(
        "privacy/ledger_entries.py",
        "replace(self.release, noise_multiplier=0.0) if self.seeded else self.release",
        "self.release",
        "tests/privacy/test_seeded_lines.py::test_a_line_with_seeded_noise_makes_the_epsilon_of_its_dataset_infinite",
    ),
    "seeded noise not marked": Mutant(
        "client/limits.py",
        'seeded=privacy.noise == "seeded"',
        "seeded=False",
        "tests/whole_app/test_node_policies.py::test_the_ledger_marks_seeded_noise",
    ),
    "parts of two divisions taken for disjoint": Mutant(
        "privacy/ledger_entries.py",
        '    return one.partition("/")[0] != other.partition("/")[0]\n',
        "    return False\n",
        "tests/privacy/test_ledger_parts.py::test_the_limit_of_a_node_counts_its_worst_part_over_all_runs",
    ),
    "an order of classes missing in a division's name": Mutant(
        "data/task_division.py",
        "json.dumps([self.kind, self.column, self.values, self.tasks])",
        "json.dumps([self.kind, self.column, sorted(self.values), self.tasks])",
        "tests/data/test_task_division.py::test_the_name_of_a_division_covers_column_values_their_order_and_tasks",
    ),
    "one task open in all rounds": Mutant(
        "client/received_round.py",
        "site.in_round(config, request.round)",
        "site.in_round(config, 1)",
        "tests/whole_app/test_tasks.py::test_each_block_has_its_own_noise_and_epsilon_is_that_of_the_worst_part",
    ),
}
HELPERS = {
    "privacy/ledger.py": "\n\n_OPEN: list[sqlite3.Connection] = []\n",
}


def copied(folder: Path) -> Path:
    """Copy all that a test needs, with the compiled modules."""
    for name in ("lalora_app", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture(scope="class")
def server():
    server = PytestServer()
    yield server
    server.close()


def run(server: PytestServer, folder: Path, test: str) -> tuple[int, str]:
    return server.run(folder, "-x", "-p", "no:cacheprovider", test)


# Two classes, because `--dist loadscope` gives each to a process of its own: this module is the
# longest of the suite.
@pytest.mark.slow
class TestWithMutants:
    @pytest.mark.parametrize("name", MUTANTS)
    def test_a_mutant_turns_its_test_red(self, name, server, tmp_path):
        mutant = MUTANTS[name]
        path = copied(tmp_path) / "lalora_app" / mutant.file
        source = path.read_text("utf-8")
        assert source.count(mutant.old) == 1
        changed = source.replace(mutant.old, mutant.new) + HELPERS.get(mutant.file, "")
        path.write_text(changed, "utf-8")
        code, output = run(server, tmp_path, mutant.test)
        assert code == FAILED, output
        # pytest has the same code for a crash of its own: its summary must name the test.
        summary = (f"FAILED {mutant.test}", f"ERROR {mutant.test}")
        assert any(line.startswith(summary) for line in output.splitlines()), output


@pytest.mark.slow
class TestWithoutMutants:
    @pytest.mark.parametrize("test", sorted({mutant.test for mutant in MUTANTS.values()}))
    def test_the_same_test_is_green(self, test, server, tmp_path):
        code, output = run(server, copied(tmp_path), test)
        assert code == PASSED, output
