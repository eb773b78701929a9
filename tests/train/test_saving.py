"""What a checkpoint holds is all that the next step depends on, whichever optimizer steps; nothing of it is code."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oomph.errors import RunError
from oomph.live.optimizers import optimizer_over
from oomph.live.recover import materialise
from oomph.live.saving import load_model, load_optimizer, load_random, read_state, save_state

KINDS = [
    ("adamw-loop", {}),
    ("adamw-foreach", {}),
    ("adamw-fused", {}),
    ("adamw-fused", {"master_weights": True}),
    ("adamw-fused", {"offload": True}),
    ("adamw-fused", {"offload": True, "master_weights": True}),
]


class Model(nn.Module):
    """Tied weights, a frozen one, a buffer that changes, a parameter that gets no gradient."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.outer = nn.Linear(4, 4, dtype=dtype), nn.Linear(4, 4, dtype=dtype)
        self.outer.weight = self.inner.weight
        self.frozen = nn.Parameter(torch.ones(4, dtype=dtype), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.outer(torch.tanh(self.inner(inputs))) * self.frozen


def make(kind: str, settings: dict[str, Any], seed: int = 0, saved: Path | None = None) -> tuple[Model, torch.optim.Optimizer]:
    """A model and its optimizer, with all states, from a checkpoint if there is one."""
    model = Model(torch.bfloat16 if settings else torch.float32, seed)
    if saved is not None:
        load_model(saved, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[:1], "lr": 0.1}, {"params": trained[1:], "lr": 0.01}]
    optimizer = optimizer_over(groups, kind, **settings)
    materialise(optimizer)
    if saved is not None:
        load_optimizer(saved, model, optimizer)
        load_random(saved)
    return model, optimizer


def step(model: Model, optimizer: torch.optim.Optimizer, times: int) -> list[float]:
    losses = []
    for _ in range(times):
        inputs = torch.randn(8, 4).to(model.frozen.dtype) * random.random() * float(np.random.rand())
        loss = model(inputs).float().square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_run_goes_on_to_the_last_bit(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer = make(kind, settings)
    step(model, optimizer, 3)
    save_state(tmp_path, model, optimizer, {"step": 3})
    ahead = step(model, optimizer, 3)
    random.seed(9)
    np.random.seed(9)
    again, own = make(kind, settings, seed=5, saved=tmp_path)
    assert step(again, own, 3) == ahead
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert int(again.seen) == 6
    assert read_state(tmp_path)["step"] == 3


def test_implementations_of_adamw_read_each_other(tmp_path: Path) -> None:
    model, optimizer = make("adamw-fused", {})
    step(model, optimizer, 3)
    save_state(tmp_path, model, optimizer, {})
    ahead = step(model, optimizer, 3)
    again, own = make("adamw-loop", {}, saved=tmp_path)
    assert step(again, own, 3) == pytest.approx(ahead, rel=1e-5)


def test_nothing_is_pickled_and_frozen_weights_are_left_out(tmp_path: Path) -> None:
    model, optimizer = make("adamw-fused", {})
    save_state(tmp_path, model, optimizer, {})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "random.safetensors", "trainer.json"}
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "model.safetensors")) == {"inner.weight", "inner.bias", "outer.bias", "unused", "seen"}
    assert "inner.weight/exp_avg_sq" in load_file(tmp_path / "optimizer.safetensors")
    json.loads((tmp_path / "trainer.json").read_text())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = make("adamw-fused", {})
    save_state(tmp_path, model, optimizer, {})
    other = Model(torch.float32)
    other.inner.bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(RunError, match=r"is of another model, in which inner\.bias is otherwise"):
        load_model(tmp_path, other)
    other = Model(torch.float32)
    other.unused.requires_grad_(False)
    with pytest.raises(RunError, match="in which unused is otherwise"):
        load_model(tmp_path, other)


def test_states_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    settings = {"master_weights": True}
    model, optimizer = make("adamw-fused", settings)
    save_state(tmp_path, model, optimizer, {})
    again = Model(torch.bfloat16)
    own = optimizer_over([p for p in again.parameters() if p.requires_grad], "adamw-fused", lr=0.1)
    materialise(own)
    with pytest.raises(RunError, match=r"is of another optimizer, in which inner\.bias/master is otherwise"):
        load_optimizer(tmp_path, again, own)


def test_another_version_is_told(tmp_path: Path) -> None:
    model, optimizer = make("adamw-fused", {})
    save_state(tmp_path, model, optimizer, {})
    (tmp_path / "trainer.json").write_text(json.dumps({**read_state(tmp_path), "schema": 9}))
    with pytest.raises(RunError, match="was written by another version, schema 9"):
        read_state(tmp_path)
