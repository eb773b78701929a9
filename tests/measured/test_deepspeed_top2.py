"""Our experts against DeepSpeed's own: routing, outputs, balance loss and gradients, as `deepspeed_top2.json` records them.

Where the variable OOMPH_DEEPSPEED_PYTHON names an interpreter that has DeepSpeed, the record is made anew and compared too.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oomph.live.balance import Shares, apply_balance, routers_of
from oomph.live.experts import MixtureOfExperts
from oomph.recipe.schema import Balance

HERE = Path(__file__).parent
PYTHON = os.environ.get("OOMPH_DEEPSPEED_PYTHON")
NAMES = {"fc1.weight": "up_proj", "fc1.bias": "up_proj_bias", "fc2.weight": "down_proj", "fc2.bias": "down_proj_bias"}


class Expert(nn.Module):
    """The FFN of Phi, with ReLU."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(hidden, inner), nn.ReLU(), nn.Linear(inner, hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class Layered(nn.Module):
    """One layer with experts, in the place of a model."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": mixture})])


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "deepspeed_top2.json").read_text(encoding="utf-8"))
    return found


def test_routing_outputs_balance_and_gradients_are_deepspeeds(recorded: dict[str, Any]) -> None:
    given = {name: torch.tensor(value) / 64 for name, value in recorded["inputs_in_64ths"].items()}
    wanted = {name: torch.tensor(value) for name, value in recorded["outputs"].items()}
    count, inner, hidden = given["fc1.weight"].shape
    mixture = MixtureOfExperts(Expert(hidden, inner), count, 2)
    with torch.no_grad():
        mixture.router.weight.copy_(given["router"])
        for name, ours in NAMES.items():
            mixture.experts.get_parameter(ours).copy_(given[name])
    model = cast(PreTrainedModel, Layered(mixture))
    apply_balance(model, Balance(kind="micro-batch", coefficient=1.0))
    routers, inputs = routers_of(model), given["hidden"].clone().requires_grad_()
    routers.begin(model, Shares())
    with routers.micro_batch():
        routers.look({"input_ids": torch.zeros((1, len(inputs)), dtype=torch.long)})
        out = mixture(inputs)
        (out * given["direction"]).sum().backward()
    routed = routers.conclude(model, routers.totals(model))
    torch.testing.assert_close(out, wanted["out"])
    assert routed.balance_loss == pytest.approx(float(wanted["balance"]), rel=1e-6)
    assert list(routed.experts[0].total) == wanted["counts"].tolist()
    gradients = {
        "hidden.grad": inputs.grad,
        "router.grad": mixture.router.weight.grad,
        "0.fc1.weight.grad": mixture.experts.get_parameter("up_proj").grad[0],  # type: ignore[index]
        "3.fc2.bias.grad": mixture.experts.get_parameter("down_proj_bias").grad[3],  # type: ignore[index]
    }
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.skipif(PYTHON is None, reason="OOMPH_DEEPSPEED_PYTHON names no interpreter with DeepSpeed")
def test_deepspeed_still_computes_what_is_recorded(recorded: dict[str, Any]) -> None:
    assert PYTHON is not None
    made = subprocess.run([PYTHON, str(HERE / "deepspeed_top2.py")], capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(made.stdout.splitlines()[-1])
    assert found["inputs_in_64ths"] == recorded["inputs_in_64ths"]
    for name, value in recorded["outputs"].items():
        torch.testing.assert_close(torch.tensor(found["outputs"][name]), torch.tensor(value), rtol=1e-5, atol=1e-6)
