"""Each mutant breaks the privacy in one line of a copy of the package; its tests must turn red."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAILED = 1  # pytest's exit code when tests ran and failed; others mean that it did not run


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    tests: str


MUTANTS = {
    "batch-mean clip": Mutant(
        "private_step/mechanism.py",
        "    scales = clip_scales(grads.norms(), clip_norm)\n",
        "    means = [grad.mean(0).norm() for grad in grads.dense().values()]\n"
        "    norms = torch.full_like(grads.norms(), float(torch.stack(means).norm()))\n"
        "    scales = clip_scales(norms, clip_norm)\n",
        "tests/private_step/test_mechanism.py",
    ),
    "per-tensor clip": Mutant(
        "private_step/gradients.py",
        "        return _norms(torch.column_stack([block.norms() for block in self.blocks]))\n",
        "        return torch.column_stack([block.norms() for block in self.blocks]).amax(1)\n",
        "tests/private_step/test_mechanism.py",
    ),
    "one-position heads left out of the norm": Mutant(
        "private_step/gradients.py",
        "        return _norms(self.g, torch.float64) * _norms(self.x, torch.float64)\n",
        "        return torch.zeros_like(_norms(self.g))\n",
        "tests/private_step/test_kernels.py",
    ),
    "gradient of an example counted twice": Mutant(
        "private_step/tape.py",
        "beta=0.0 if first else 1.0, alpha=scale)",
        "beta=0.0 if first else 1.0, alpha=2 * scale)",
        "tests/private_step/test_kernels.py",
    ),
    "per-window clip": Mutant(
        "private_step/tape.py",
        "        return x.reshape(self._examples, -1, x.shape[-1])\n",
        "        return x.reshape(x.shape[0], -1, x.shape[-1])\n",
        "tests/private_step/test_per_example.py",
    ),
    "noise skipped": Mutant(
        "private_step/mechanism.py",
        "alpha=noise_std)",
        "alpha=0.0)",
        "tests/private_step/test_mechanism.py",
    ),
    "noise scaled by 2/3": Mutant(
        "private_step/mechanism.py",
        "alpha=noise_std)",
        "alpha=2 / 3 * noise_std)",
        "tests/private_step/test_mechanism.py",
    ),
    "noise halved": Mutant(
        "private_step/mechanism.py",
        "alpha=noise_std)",
        "alpha=noise_std / 2)",
        "tests/private_step/test_mechanism.py",
    ),
    "the same noise in every step": Mutant(
        "private_step/mechanism.py",
        "        return torch.from_numpy(rng.standard_normal(size)).to(like)\n",
        "        rng = np.random.default_rng(0)\n"
        "        return torch.from_numpy(rng.standard_normal(size)).to(like)\n",
        "tests/private_step/test_mechanism.py",
    ),
    "no noise on one factor": Mutant(
        "private_step/mechanism.py",
        "    noised = torch._foreach_add(totals, shaped, alpha=noise_std)\n",
        '    shaped = [s * (".lora_A." not in n) for n, s in zip(sums, shaped, strict=True)]\n'
        "    noised = torch._foreach_add(totals, shaped, alpha=noise_std)\n",
        "tests/private_step/test_mechanism.py",
    ),
    "noise without the clip norm": Mutant(
        "private_step/step.py",
        "return z * clip_norm if z > 0 else 0.0",
        "return z",
        "tests/private_step/test_mechanism.py",
    ),
    "gates differentiated in the batch's mean": Mutant(
        "private_step/reparametrised_engine.py",
        "        (pulled,) = torch.vmap(pullback)(grads)\n",
        "        grads = {n: g.mean(0, keepdim=True).expand_as(g) for n, g in grads.items()}\n"
        "        (pulled,) = torch.vmap(pullback)(grads)\n",
        "tests/adapter/test_parametrisations.py",
    ),
    "realised batch size": Mutant(
        "private_step/step.py",
        "    expected = q * len(data)\n",
        "    expected = max(len(indices), 1)\n",
        "tests/private_step/test_mechanism.py",
    ),
    "a step not counted": Mutant(
        "client/requests.py",
        "        Release(q, noise_multiplier, steps),\n",
        "        Release(q, noise_multiplier, steps - 1),\n",
        "tests/whole_app/test_contract.py",
    ),
    "a step not counted, and the guard gone": Mutant(
        "privacy/ledger.py",
        "    numbers = (release.sampling_rate, release.noise_multiplier, release.count)\n",
        "    count = max(release.count - 1, 1)\n"
        "    numbers = (release.sampling_rate, release.noise_multiplier, count)\n",
        "tests/whole_app/test_contract.py",
    ),
    "more steps than reserved": Mutant(
        "privacy/ledger.py",
        "        if self._left == 0:\n",
        "        if False:\n",
        "tests/private_step/test_mechanism.py",
    ),
    "ledger written after training": Mutant(
        "client/requests.py",
        "    reservation = reserve(current)\n"
        "    clock.append(time.monotonic())\n"
        "    streams = _streams(current.config, current.site.client, current.request.attempt)\n"
        "    result = run_local_steps(current, start, reservation, streams)\n",
        "    train = current.config.train\n"
        "    rate = train.batch_size / len(current.data)\n"
        "    reservation = Reservation(Release(rate, 1.0, train.local_steps))\n"
        "    clock.append(time.monotonic())\n"
        "    streams = _streams(current.config, current.site.client, current.request.attempt)\n"
        "    result = run_local_steps(current, start, reservation, streams)\n"
        "    reserve(current)\n",
        "tests/client/test_kill.py",
    ),
    "ledger not committed": Mutant(
        "privacy/ledger.py",
        '            db.execute("COMMIT")\n',
        "            _OPEN.append(db)  # committed when the process ends, if it ends well\n",
        "tests/privacy/test_ledger.py",
    ),
    "shuffled batches": Mutant(
        "private_step/mechanism.py",
        "    return np.flatnonzero(rng.random(size) < rate)\n",
        "    return np.sort(rng.permutation(size)[: round(rate * size)])\n",
        "tests/private_step/test_mechanism.py",
    ),
    "empty batches skipped": Mutant(
        "private_step/step.py",
        "    sums = _clipped_batch_sum(model, data, indices, clip_norm, micro_batch)\n",
        "    sums = _clipped_batch_sum(model, data, indices, clip_norm, micro_batch)\n"
        "    if not len(indices):\n"
        "        return NoisedGrads(sums)\n",
        "tests/private_step/test_mechanism.py",
    ),
    "non-finite examples scaled": Mutant(
        "private_step/mechanism.py",
        "        grads = grads.zero_examples(dropped)\n",
        "        pass\n",
        "tests/private_step/test_mechanism.py",
    ),
    "train loss in the reply": Mutant(
        "wire/messages.py",
        '        metrics = MetricRecord({"round": self.round, "epsilon": self.epsilon, **sizes})\n',
        '        metrics = MetricRecord({"round": self.round, "epsilon": self.epsilon, "loss": 0.5})\n',
        "tests/whole_app/test_reply_contents.py",
    ),
    "exception text in the reply": Mutant(
        "client_app.py",
        "        content = messages.refusal(_refusal_key(error, context.node_config))\n",
        "        content = RecordDict({messages.CONFIG: messages.ConfigRecord({'refusal': str(error)})})\n",
        "tests/whole_app/test_reply_contents.py",
    ),
    "padded to the longest of the batch": Mutant(
        "data/encoding.py",
        "yield self.batch(part[start : start + size], width)",
        "yield self.batch(part[start : start + size])",
        "tests/data/test_encoding.py",
    ),
    "a head's norm in float32": Mutant(
        "private_step/gradients.py",
        "        return _norms(self.g, torch.float64) * _norms(self.x, torch.float64)\n",
        "        return _norms(self.g) * _norms(self.x)\n",
        "tests/private_step/test_mechanism.py",
    ),
    "columns of the server's choice": Mutant(
        "client/site.py",
        "    _check_columns(config, node)\n    rank",
        "    rank",
        "tests/client/test_site.py",
    ),
    "resting factor steps": Mutant(
        "client/local_round.py",
        "        parameter.grad = gradients.get(name)\n",
        "        parameter.grad = gradients.get(name, torch.zeros_like(parameter))\n",
        "tests/whole_app/test_local_steps.py",
    ),
}
HELPERS = {
    "privacy/ledger.py": "\n\n_OPEN: list[sqlite3.Connection] = []\n",
}


QUIETLY = ("-p", "no:cacheprovider")


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_its_tests_red(name, tmp_path):
    mutant = MUTANTS[name]
    for folder in ("lalora_app", "tests", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "lalora_app" / mutant.file
    source = path.read_text("utf-8")
    assert source.count(mutant.old) == 1
    path.write_text(source.replace(mutant.old, mutant.new) + HELPERS.get(mutant.file, ""), "utf-8")
    done = subprocess.run(
        [*(sys.executable, "-m", "pytest", "-x", "-m", "not wide"), *QUIETLY, mutant.tests],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == FAILED, done.stdout + done.stderr
