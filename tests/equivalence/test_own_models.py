"""`oomph.predict` of models that are nobody's but the user's: what it traces is what a real step on the CPU allocates.

The CUDA rules are off, since they say where CUDA differs. Compared are the bytes alive before the second step, the peak in it,
and the sizes of all births, but for single numbers, what kernels take and free within a call, and random states that
recomputation keeps: docs/fidelity.md says why.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from oomph.core import predict as core
from oomph.core.devices import find_gpu
from oomph.core.forms import FormKey
from oomph.core.layout import lay_out
from oomph.live.model import build
from oomph.live.predict import Task, predict, trace_steps
from oomph.live.source import make_form
from oomph.live.step import LOSSES, train_step
from oomph.records import Choice, Prediction

NUMBER = 8
CARD = "A100-SXM4-40GB"
Step = Callable[..., Any]
Optimizer = Callable[[Any], torch.optim.Optimizer]


# Models.


class Classifier(nn.Module):
    """An encoder over token ids, the embeddings tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.embed = nn.Embedding(500, 64)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 500, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)))


class UNet(nn.Module):
    """Down, across, up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.across = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Conv2d(32, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        wide = self.down(image)
        deep = self.across(F.max_pool2d(wide, 2))
        return self.out(torch.cat([wide, self.up(deep)], 1))


class Square(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Squared(nn.Module):
    """Linear layers, one of them with a parametrized weight, and `Square`; blocks are recomputed as `reentrant` says."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
        self.first = weight_norm(nn.Linear(32, 64))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = (
                self._block(block, x)
                if self.reentrant is None
                else checkpoint(self._block, block, x, use_reentrant=self.reentrant)
            )
        return x

    @staticmethod
    def _block(block: nn.Module, x: Tensor) -> Tensor:
        return Square.apply(block(x)).tanh()


class Tagger(nn.Module):
    """A recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(16, 32, 2, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


# Steps.


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    inputs, labels = (tensor.to(next(model.parameters()).device) for tensor in batch)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def regress(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulate_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    for part in batch["images"].chunk(batch["parts"]):
        loss = F.mse_loss(model(part), part) / batch["parts"]
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def evaluate(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # a dispatch mode keeps torch from its fused evaluation, which is said
    with torch.no_grad():
        F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    torch.backends.mha.set_fastpath_enabled(True)


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    step: Step
    batch: Any
    optimizer: Optimizer | None


IDS = torch.arange(4 * 32).view(4, 32) % 500
IMAGES = {"images": torch.zeros(4, 3, 16, 16), "parts": 2}
ROWS = torch.zeros(24, 32)


def muon(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Muon([parameter for parameter in parameters if parameter.dim() == 2])


CASES = {
    "encoder, AdamW": Case(Classifier, train, (IDS, IDS), torch.optim.AdamW),
    "encoder, evaluation": Case(Classifier, evaluate, (IDS, IDS), None),
    "U-Net, SGD with momentum": Case(UNet, accumulate_gradients, IMAGES, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "LSTM, Adam": Case(Tagger, train, (torch.zeros(4, 6, 16), torch.zeros(4, 6, dtype=torch.long)), torch.optim.Adam),
    "own function, Adafactor": Case(Squared, regress, ROWS, torch.optim.Adafactor),
    "own function, Muon": Case(Squared, regress, ROWS, muon),
    "own function, AdamW over lists": Case(Squared, regress, ROWS, lambda p: torch.optim.AdamW(p, foreach=True)),
    "recomputed": Case(lambda: Squared(False), regress, ROWS, torch.optim.NAdam),
    "recomputed, reentrant": Case(lambda: Squared(True), regress, ROWS, torch.optim.RMSprop),
}


# Tests.


class Lived(NamedTuple):
    """Bytes alive before the second step, and of each birth (> 0) and death (< 0) in it, with the operator."""

    before: int
    events: list[tuple[int, str]]

    def peak(self) -> int:
        """The most bytes alive in the step beyond those before it."""
        return max(accumulate(nbytes for nbytes, _ in self.events))

    def births(self) -> Counter[tuple[int, str]]:
        """Births by bytes and operator, without overload."""
        return Counter(event for event in self.events if event[0] > 0)


def traced_step(case: Case) -> Lived:
    trace = trace_steps(Task(case.step, case.model(), case.batch, case.optimizer)).trace
    rows = [trace.storages[entry if entry >= 0 else ~entry] for entry in trace.timeline]
    signed = [row.nbytes if entry >= 0 else -row.nbytes for entry, row in zip(trace.timeline, rows, strict=True)]
    start = trace.pieces[2].start
    names = ["::".join(row.kind.op.split(".")[:2]) for row in rows]
    return Lived(
        sum(signed[:start]), [pair for pair in zip(signed[start:], names[start:], strict=True) if abs(pair[0]) > NUMBER]
    )


def real_step(case: Case, measure: Any) -> Lived:
    def make() -> Callable[[], None]:
        model = case.model()
        made = [] if case.optimizer is None else [case.optimizer([p for p in model.parameters() if p.requires_grad])]
        return lambda: case.step(model, *made, copy.deepcopy(case.batch))

    step = measure(make)
    kept = [event for event in step.phases["step"] if abs(event.nbytes) > NUMBER and not event.inside]
    random_state = torch.get_rng_state().nbytes
    return Lived(step.before, [(e.nbytes, e.op) for e in kept if e.op or abs(e.nbytes) != random_state])


# Births that one side alone has, by the operator.
ONLY_TRACED = {"aten::add": "the bias of a linear layer, which torch adds in place unless it is watched"}
ONLY_REAL = {"aten::zeros_like": "the gradient of a squared error, which the CPU's kernel makes once more"}


@pytest.mark.parametrize("name", CASES)
def test_what_is_traced_is_what_a_real_step_allocates(name: str, measure: Any, reproducible: Any) -> None:
    case = CASES[name]
    with reproducible():
        traced = traced_step(case)
    real = real_step(case, measure)
    assert traced.before == real.before
    assert traced.peak() == real.peak()
    sizes = [Counter(nbytes for nbytes, _ in side.events if nbytes > 0) for side in (traced, real)]
    for alone, side, known in ((sizes[0] - sizes[1], traced, ONLY_TRACED), (sizes[1] - sizes[0], real, ONLY_REAL)):
        for nbytes in alone:
            assert {op for found, op in side.events if found == nbytes} & known.keys(), (nbytes, side.births())


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_a_model_of_transformers_gives_what_a_plan_predicts(kind: str, plain_key: FormKey, tmp_path: Path) -> None:
    sizes: dict[str, int] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1000}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(tmp_path)
    form = make_form(replace(plain_key, model=str(tmp_path), shape=(2, 300, 0), optimizer=f"adamw-{kind}")).form
    assert form is not None
    choice = Choice(2, 1, 2, optimizer=f"adamw-{kind}")  # type: ignore[arg-type]
    planned = core.predict(lay_out(form, choice, 300, 0), choice, find_gpu(CARD), form.unclassified)

    def step(model: Any, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]]) -> None:
        train_step(model, optimizer, [batches.pop], LOSSES["full"], 1)

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-4, **{kind: True})

    ids = torch.zeros(2, 300, dtype=torch.long)
    model, batch = build(config, torch.bfloat16, "sdpa"), [{"input_ids": ids, "labels": ids.clone()}]
    own = predict(step, model, batch, gpu=CARD, optimizer=make)
    for field in fields(Prediction):
        if field.name not in ("by_role", "largest_requests"):  # a plan knows the logits by the vocabulary
            assert getattr(own, field.name) == getattr(planned, field.name), field.name
    assert sum(own.by_role.values()) == sum(planned.by_role.values())


IDS_OF_ONE = torch.zeros(1, 64, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "kernel"),
    [
        ({}, "flash"),
        ({"attention_mask": torch.ones_like(IDS_OF_ONE)}, "flash"),
        ({"attention_mask": torch.ones_like(IDS_OF_ONE).triu(3)}, "efficient"),
        ({"position_ids": torch.arange(64)[None]}, "flash"),
        ({"position_ids": torch.arange(64)[None] % 16}, "efficient"),
    ],
    ids=["no mask", "mask of ones", "padded", "one sequence", "packed"],
)
def test_masks_of_transformers_are_read(inputs: dict[str, Tensor], kernel: str) -> None:
    """As in a run, flash attention takes what needs no mask, which a mask that hides nothing does not."""
    heads: dict[str, int] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    model = build(LlamaConfig(hidden_size=32, intermediate_size=32, vocab_size=64, **heads), torch.bfloat16, "sdpa")

    def step(model: Any, batch: dict[str, Tensor]) -> None:
        model(**batch).loss.backward()

    batch = {"input_ids": IDS_OF_ONE, "labels": IDS_OF_ONE.clone(), **inputs}
    trace = trace_steps(Task(step, model, batch, capability=(8, 0))).trace
    kernels = {storage.kind.op for storage in trace.storages if storage.kind.op.endswith("attention.default")}
    assert kernels == {f"aten._scaled_dot_product_{kernel}_attention.default"}
