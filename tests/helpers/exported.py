"""A run's result on a tiny model, written by the app and loaded again as users load it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conftest import WORDS
from lalora_app.data.encoding import Batch
from lalora_app.data.examples import Examples
from lalora_app.models.backbone import Backbone, build
from lalora_app.models.forwards import Segmented, masked_mean
from lalora_app.models.transformers_models import auto_class
from lalora_app.results.merge import merge
from lalora_app.results.peft_export import export
from lalora_app.results.run_folder import RunFolder
from lalora_app.server_state.state import ServerState
from lalora_app.settings.run_config import Config

NAMES = ("spam", "ham", "not sure")  # in an order that no sorting gives
CLASSES = {"data.labels": ",".join(NAMES), "data.num-labels": len(NAMES)}
ROW = {"attempt": 1, "round": 1, "accuracy": 0.5, "perplexity": 3.0, "epsilon_max": 1.0}
STD = 0.3  # of every trained number: logits of about 1


def random_texts(count: int = 32, longest: int = 14) -> list[str]:
    """Texts of 1 to ``longest`` words; the last ones are longer than ``model.max-length``."""
    rng = np.random.default_rng(5)
    lengths = [1 + i % longest for i in range(count)]
    return [" ".join(rng.choice(WORDS[5:], size=length)) for length in lengths]


def random_state(start: dict[str, np.ndarray], drift: bool, mixed: bool) -> ServerState:
    """A state whose tensors are all random; with drift of rank 3; with layers of unequal ranks."""
    rng = np.random.default_rng(1)

    def drawn(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(0, STD, shape).astype(np.float32)

    adapter = {name: drawn(array.shape) for name, array in start.items()}
    bs = [name for name in adapter if ".lora_B." in name]
    if mixed:  # the first layer needs one direction fewer than the others
        adapter[bs[0]][:, -1] = 0
        adapter[bs[0].replace("lora_B", "lora_A")][-1] = 0
    moved = {}
    for b in bs if drift else []:
        a = b.replace("lora_B", "lora_A")
        moved |= {b: drawn((len(adapter[b]), 3)), a: drawn((3, adapter[a].shape[1]))}
    return ServerState(adapter, 1, attempts=1, drift=moved)


@dataclass
class Exported:
    """A run's model with its state, the adapter's folder, the merged folder and its code."""

    config: Config
    backbone: Backbone
    run: RunFolder
    merged: Path
    code: str

    @property
    def adapter(self) -> Path:
        return self.run.adapter

    @property
    def segmented(self) -> bool:
        return isinstance(self.backbone.forward, Segmented)

    def batch(self, contents: list[Any]) -> Batch:
        """Texts, pairs of texts, or the bytes of images of one size, as the run encodes them."""
        encoded = self.backbone.encode(Examples(tuple(contents), (0,) * len(contents)))
        return encoded.batch(range(len(contents)))

    @torch.no_grad()
    def logits(self, contents: list[Any]) -> Tensor:
        """The run's own."""
        return self.backbone.logits(self.batch(contents))

    def load_merged(self) -> Any:
        """The merged model, by the code that ``lalora merge`` prints."""
        names: dict[str, Any] = {}
        exec(self.code, names)
        return names["model"].eval()


def exported(config: Config, folder: Path, drift: bool = False, mixed: bool = False) -> Exported:
    """Write a random result by the app's own functions."""
    backbone, start = build(config)
    state = random_state(start, drift, mixed)
    run = RunFolder(folder / "run")
    run.path.mkdir()
    run.write_config(config)
    run.checkpoint(state)
    run.write_history([ROW])
    export(backbone, state, run.adapter, config, ROW)
    code = merge(run.path, folder / "merged")
    opened = replace(config, model=replace(config.model, device="cpu", dtype="float32"))
    again, _ = build(opened)
    again.load(state.adapter, state.drift)
    return Exported(config, again, run, folder / "merged", code)


def stock_base(config: Config) -> nn.Module:
    """The base model in its stock class, with a fresh head of its own."""
    import transformers

    torch.manual_seed(99)
    options: dict[str, Any] = {"ignore_mismatched_sizes": True, "dtype": torch.float32}
    if config.model.task != "causal-lm":
        options["num_labels"] = len(NAMES)
    auto = getattr(transformers, auto_class(config.model))
    return auto.from_pretrained(config.model.name, **options).eval()


def tokens_of(folder: Path, texts: list[Any]) -> dict[str, Tensor]:
    """The texts or pairs of texts by the folder's own tokenizer."""
    import transformers

    # else transformers asks on the terminal whether it may run the code of the head
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    pairs = isinstance(texts[0], tuple)
    columns = [list(column) for column in zip(*texts, strict=True)] if pairs else [texts]
    return dict(tokenizer(*columns, padding=True, truncation=True, return_tensors="pt"))


@torch.no_grad()
def logits_of(model: nn.Module, tokens: dict[str, Tensor], mean: bool = False) -> Tensor:
    """The logits of a model; ``mean``: of a token classifier, averaged as the card says."""
    out: Tensor = model(**tokens).logits
    return masked_mean(out, tokens["attention_mask"]) if mean else out


def scores_in_order(answers: list[Any]) -> Tensor:
    """Return (examples, labels) from a pipeline's answers, by the names of the classes."""
    rows = [{entry["label"]: entry["score"] for entry in answer} for answer in answers]
    return torch.tensor([[row[name] for name in NAMES] for row in rows])
