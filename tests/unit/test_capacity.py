"""The planned dispatch under a capacity against its definition, written out token by token."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, PhiConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP

from oomph.core.closed_form import Load
from oomph.core.dimensions import capacity
from oomph.errors import UserError
from oomph.live.capacity import CapacityMixture, load_of
from oomph.live.model import to_fake
from oomph.recipe import Experts
from oomph.units import GIB

COUNT = 4


def mixture(factor: float, gated: bool = False) -> CapacityMixture:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    dense = LlamaMLP(LlamaConfig(**sizes)) if gated else PhiMLP(PhiConfig(**sizes))
    made = CapacityMixture(dense, COUNT, factor)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def routed(logits: Tensor, noise: Tensor, room: int) -> list[dict[int, tuple[int, float]]]:
    """Of each token: the place and the weight at each expert that takes it. All first choices queue before all second ones."""
    probabilities = logits.softmax(dim=1).tolist()
    first = [max(range(COUNT), key=row.__getitem__) for row in probabilities]
    noisy = (logits + noise).tolist()
    second = [max((e for e in range(COUNT) if e != best), key=row.__getitem__) for best, row in zip(first, noisy, strict=True)]
    taken = [0] * COUNT
    found: list[dict[int, tuple[int, float]]] = [{} for _ in first]
    for choices in (first, second):
        for token, expert in enumerate(choices):
            if taken[expert] < room:
                found[token][expert] = (taken[expert], probabilities[token][expert])
            taken[expert] += 1
    sums = [sum(weight for _, weight in places.values()) for places in found]
    return [{e: (at, w / total) for e, (at, w) in places.items()} for places, total in zip(found, sums, strict=True)]


@pytest.mark.parametrize("factor", [0.25, 0.7, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("tokens", [1, 7, 20, 33])
def test_the_gate_is_its_definition(factor: float, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    logits, noise = (torch.randn((tokens, COUNT), generator=generator) for _ in range(2))
    combine, taken = mixture(factor).gate(logits, noise)
    room = capacity(tokens, Load(COUNT, 2 * factor))
    expected = torch.zeros(tokens, COUNT, room)
    for token, places in enumerate(routed(logits, noise, room)):
        for expert, (place, weight) in places.items():
            expected[token, expert, place] = weight
    torch.testing.assert_close(combine, expected)
    assert torch.equal(taken, expected > 0)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("factor", [0.5, 4.0], ids=["drops", "has room"])
def test_a_layer_is_the_weighted_sum_of_the_experts_that_take_a_token(
    factor: float, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mixture(factor, gated)
    hidden = torch.randn((2, 9, 16), generator=torch.Generator().manual_seed(0))
    noise = torch.randn((18, COUNT), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("oomph.live.capacity._gumbel", lambda logits: noise)
    rows = hidden.view(18, 16)
    places = routed(made.router(rows), noise, capacity(18, Load(COUNT, 2 * factor)))
    expected = torch.stack(
        [
            sum((w * made.experts.copies[e](rows[token]) for e, (_, w) in at.items()), torch.zeros(16))
            for token, at in enumerate(places)
        ]
    )
    assert any(len(at) < 2 for at in places) == (factor < 1)
    torch.testing.assert_close(made(hidden), expected.view(2, 9, 16))


def test_experts_that_are_copies_compute_what_the_dense_block_did() -> None:
    dense = PhiMLP(PhiConfig(hidden_size=16, intermediate_size=32))
    made = CapacityMixture(dense, COUNT, 4.0)
    hidden = torch.randn(2, 9, 16)
    torch.testing.assert_close(made(hidden), dense(hidden))
    made.experts.copies[0].get_parameter("fc1.weight").data.zero_()
    assert dense.fc1.weight.any()


def test_the_balance_loss_reaches_the_router_through_mean_probabilities() -> None:
    """E · sum over e of (share of first choices) · (mean probability), times its coefficient, beside the rest."""
    made = mixture(1.5)
    logits = torch.randn((20, COUNT), generator=torch.Generator().manual_seed(2)).requires_grad_()
    noise, scale = torch.zeros(20, COUNT), torch.randn((20, COUNT, 15), generator=torch.Generator().manual_seed(3))

    def gradient() -> Tensor:
        (found,) = torch.autograd.grad((made.gate(logits, noise)[0] * scale).sum(), logits)
        return found

    plain = gradient()
    made.coefficient = 0.3
    probabilities = logits.softmax(dim=1)
    shares = torch.bincount(probabilities.argmax(dim=1), minlength=COUNT) / 20
    (added,) = torch.autograd.grad(0.3 * COUNT * (shares * probabilities.mean(dim=0)).sum(), logits)
    torch.testing.assert_close(gradient(), plain + added)


@given(st.integers(1, 50_000), st.integers(2, 64), st.sampled_from([0.5, 0.7, 1.0, 1.1, 1.25, 1.5, 2.0]))
def test_capacity_is_what_torch_makes_of_it(tokens: int, count: int, factor: float) -> None:
    """``ceil`` of a float32 product, as in DeepSpeed v0.9.5, moe/sharded_moe.py."""
    expected = torch.ceil((tokens / count) * torch.tensor(2 * factor)).to(torch.int64)
    assert capacity(tokens, Load(count, 2 * factor)) == int(expected)


def test_only_one_load_for_all_layers_makes_formulas() -> None:
    def experts(**changes: Any) -> Experts:
        return Experts.model_validate({"count": 4, "top_k": 2, "dispatch": "capacity", **changes})

    assert load_of(experts()) == Load(4, 3.0)
    assert load_of(experts(count=[8, 8], capacity_factor=1.0)) == Load(8, 2.0)
    assert load_of(experts(count=[4, 8])) is None
    assert load_of(Experts(count=4, top_k=2)) is None
    assert load_of(None) is None


def test_what_is_no_feed_forward_block_has_no_experts() -> None:
    dense = PhiMLP(PhiConfig(hidden_size=16, intermediate_size=32))
    odd = copy.deepcopy(dense)
    odd.register_module("fc2", nn.Sequential(dense.fc2))
    with pytest.raises(UserError, match="is not an FFN"):
        CapacityMixture(odd, COUNT, 1.5)


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._dies, storage._cdata, storage.nbytes())
        return out

    def _dies(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("samples", "tokens", "forward", "whole"), [(8, 2623, 18.6, 23.5), (4, 2623, 4.7, 7.8)])
def test_one_recomputed_layer_of_phi_2_takes_what_another_simulation_says(
    samples: int, tokens: int, forward: float, whole: float
) -> None:
    """GiB above the weights. The other one leaves out the gradients of a layer's experts, 0.1 GiB for each."""
    with torch.device("meta"):
        made = CapacityMixture(PhiMLP(PhiConfig(hidden_size=2560, intermediate_size=10240)), COUNT, 1.5).bfloat16()
    mode = FakeTensorMode()
    to_fake(made, mode)
    with mode:
        hidden = torch.empty((samples, tokens, 2560), dtype=torch.bfloat16, requires_grad=True)
        for parameter in made.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Live() as live:
            out: Any = checkpoint(made, hidden, use_reentrant=False, preserve_rng_state=False)
            assert live.peak / GIB == pytest.approx(forward, rel=0.01)
            out.backward(torch.ones_like(out))
    assert whole < live.peak / GIB < whole + 0.4
