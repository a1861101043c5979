"""Parts of transformers, PEFT, torch and Opacus that are not public, by the feature that breaks."""

import importlib
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from torch import nn

from conftest import ROOT


def breaks(library: str, feature: str, detail: str = "") -> str:
    return f"{library} {version(library)} breaks: {feature}. {detail}"


TARGETS = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
NAMES = {
    "transformers.modeling_layers.GradientCheckpointingLayer": "model.checkpointing=true",
    "transformers.pytorch_utils.Conv1D": "GPT-2's linear layers",
    "transformers.models.deberta.modeling_deberta.DisentangledSelfAttention": "DeBERTa",
    "transformers.models.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention": "DeBERTa-v2",
    "torch._dynamo.exc.TorchDynamoException": 'the refusal of lora.kernel="compiled"',
    f"peft.utils.constants.{TARGETS}": 'lora.targets="auto"',
    "peft.utils.constants.DUMMY_TARGET_MODULES": 'method="full"',
    "peft.tuners.lora.Linear": "the LoRA layers of the private step",
    "torch._foreach_add": "the noise of the private step",
    "torch._foreach_add_": "the sum of clipped gradients",
    "torch._foreach_div_": "the mean of noised gradients",
}


@pytest.mark.parametrize("name", list(NAMES))
def test_each_private_name_is_there(name):
    module, _, attribute = name.rpartition(".")
    try:
        there = hasattr(importlib.import_module(module), attribute)
    except ImportError:
        there = False
    assert there, breaks(name.split(".")[0], NAMES[name], f"{name} is gone")


@pytest.fixture(scope="module")
def adapted(tiny_model):
    """A tiny BERT with LoRA on its queries, as the app adapts it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForTokenClassification

    base = AutoModelForTokenClassification.from_pretrained(tiny_model, attn_implementation="sdpa")
    return get_peft_model(base, LoraConfig(r=2, target_modules=["query"])).eval()


def lora_layer(model):
    from peft.tuners.lora import Linear as LoraLinear

    return next(m for m in model.modules() if isinstance(m, LoraLinear))


def test_transformers_keeps_the_attention_in_the_config(adapted):
    feature = "the ready attention mask on a GPU (lalora_app/models/forwards.py)"
    found = getattr(adapted.config, "_attn_implementation", None)
    assert found == "sdpa", breaks("transformers", feature, "config._attn_implementation is gone")


def test_transformers_recomputes_in_layers_of_one_class(adapted):
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in adapted.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(layers) == adapted.config.num_hidden_layers, breaks(
        "transformers", "model.checkpointing=true", "BERT's layers are of another class"
    )
    assert all(hasattr(layer, "gradient_checkpointing") for layer in layers), breaks(
        "transformers", "model.checkpointing=true", "layers have no gradient_checkpointing"
    )


PARTS = {
    "base_layer": nn.Linear,
    "lora_A": nn.ModuleDict,
    "lora_B": nn.ModuleDict,
    "lora_dropout": nn.ModuleDict,
    "scaling": dict,
    "lora_bias": dict,
    "lora_variant": dict,
    "fan_in_fan_out": bool,
    "disable_adapters": bool,
    "merged": bool,
}


@pytest.mark.parametrize("name", list(PARTS))
def test_a_lora_layer_of_peft_has_the_parts_that_the_kernels_read(name, adapted):
    part = getattr(lora_layer(adapted), name, None)
    assert isinstance(part, PARTS[name]), breaks(
        "peft", "the kernels of lalora_app/private_step/attach.py", f"{name} is {type(part)}"
    )


def test_a_lora_layer_of_peft_computes_base_plus_scaled_product(adapted):
    layer = lora_layer(adapted)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        b.weight.normal_()
        x = torch.randn(3, a.in_features)
        expected = layer.base_layer(x) + layer.scaling["default"] * (x @ a.weight.T @ b.weight.T)
        assert torch.allclose(layer(x), expected, atol=1e-6), breaks(
            "peft", "the fused and merged kernels", "the layer computes something else"
        )
        b.weight.zero_()


def test_torch_counts_the_writes_to_a_tensor():
    tensor = torch.zeros(1)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version > before, breaks("torch", 'the cache of lora.kernel="merged"')


@pytest.mark.parametrize("kind", ["PRVAccountant", "RDPAccountant"])
def test_opacus_s_accountants_read_noise_rate_and_count_from_their_history(kind):
    from opacus import accountants

    known = getattr(accountants, kind)()
    for _ in range(5):
        known.step(noise_multiplier=1.5, sample_rate=0.1)
    assert known.history == [(1.5, 0.1, 5)], breaks(
        "opacus", "every epsilon of lalora_app/privacy/accounting.py", str(known.history)
    )


ALONE = """
import sys
from lalora_app.privacy.accounting import Release, epsilon
found = epsilon([Release(0.01, 1.0, 100), Release(0.02, 2.0, 50)], 1e-5)
heavy = [name for name in sys.modules if name.split(".")[0] in ("torch", "opacus")]
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant
whole = PRVAccountant()
whole.history = [(1.0, 0.01, 100), (2.0, 0.02, 50)]
print(heavy, found.hex(), float(whole.get_epsilon(delta=1e-5, eps_error=0.003)).hex())
"""


def test_opacus_s_accountants_work_without_torch_and_are_those_of_the_whole_package():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=ROOT)
    feature = "refusals without torch (lalora_app/privacy/opacus_accountants.py)"
    assert done.returncode == 0, breaks("opacus", feature, done.stderr[-500:])
    heavy, alone, whole = done.stdout.split()
    assert heavy == "[]", breaks("opacus", feature, done.stdout)
    assert alone == whole
