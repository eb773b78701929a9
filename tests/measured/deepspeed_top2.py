"""Records what DeepSpeed's own mixture of experts computes on the CPU, for `test_deepspeed_top2.py`.

Run it where DeepSpeed is installed; it prints one JSON document. Nothing of Oomph is imported. Every token keeps both of its
experts (capacity is that of all tokens), and the second expert is chosen without noise.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

import torch
from torch import nn

TOKENS, HIDDEN, INNER, COUNT = 20, 8, 16, 4


def numbers(*shape: int, seed: int) -> torch.Tensor:
    """Random multiples of 1/64, exact in float32."""
    return torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(seed)).float() / 64


def experts() -> dict[str, torch.Tensor]:
    """The experts' weights and biases, and the router's weight."""
    shapes = {"fc1.weight": (INNER, HIDDEN), "fc1.bias": (INNER,), "fc2.weight": (HIDDEN, INNER), "fc2.bias": (HIDDEN,)}
    made = {name: numbers(COUNT, *shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    return made | {"router": numbers(COUNT, HIDDEN, seed=9)}


class Expert(nn.Module):
    """The FFN of Phi, with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(hidden).relu())


def record() -> dict[str, object]:
    """Inputs, outputs and gradients of one layer."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    backend = sys.modules["deepspeed.comm.torch"]
    vars(backend)["build_shm_op"] = lambda: None  # compiled on first use, for processes on one machine: there is one
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    deepspeed.init_distributed("gloo")
    sizes = {"hidden_size": HIDDEN, "num_experts": COUNT, "k": 2, "min_capacity": 0, "ep_size": 1}
    layer = MoE(expert=Expert(), capacity_factor=COUNT / 2, top2_2nd_expert_sampling=False, **sizes)
    layer.set_deepspeed_parallelism()
    given = experts()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(given["router"])
        for number, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            for name, parameter in expert.named_parameters():
                parameter.copy_(given[name][number])
    hidden, direction = numbers(TOKENS, HIDDEN, seed=20).requires_grad_(), numbers(TOKENS, HIDDEN, seed=21)
    out, balance, chosen = layer(hidden)
    ((out * direction).sum() + balance).backward()
    first, second = layer.deepspeed_moe.experts.deepspeed_experts[0], layer.deepspeed_moe.experts.deepspeed_experts[3]
    found = {
        "out": out,
        "balance": balance,
        "counts": chosen,
        "hidden.grad": hidden.grad,
        "router.grad": layer.deepspeed_moe.gate.wg.weight.grad,
        "0.fc1.weight.grad": first.fc1.weight.grad,
        "3.fc2.bias.grad": second.fc2.bias.grad,
    }
    inputs = {**given, "hidden": hidden, "direction": direction}
    return {
        "made": "python deepspeed_top2.py, on a CPU",
        "versions": {"deepspeed": deepspeed.__version__, "torch": torch.__version__},
        "settings": {**sizes, "capacity_factor": COUNT / 2, "top2_2nd_expert_sampling": False},
        "inputs_in_64ths": {name: (64 * tensor.detach()).int().tolist() for name, tensor in inputs.items()},
        "outputs": {name: torch.as_tensor(tensor).detach().tolist() for name, tensor in found.items()},
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        found = record()
    sys.stdout.write(json.dumps(found) + "\n")
