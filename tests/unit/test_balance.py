"""The balance of experts against its formulas, under every kind of recomputation, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from oomph.core.admission import Admission, Together
from oomph.errors import UserError
from oomph.live.balance import GROUPS, LENGTHS, Shares, apply_balance, routers_of
from oomph.live.experts import MixtureOfExperts, Router
from oomph.live.moe import upcycle
from oomph.live.step import LOSSES, accumulate
from oomph.recipe import Experts
from oomph.recipe.schema import Balance

COUNT, TOP_K, VOCAB = 4, 2, 96
LENGTH = torch.tensor([9, 5, 7, 9])
IDS = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(1))
SHARES = Shares(samples=4, groups=2, micro_batches=1, tokens=30)
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}


def dense() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(intermediate_size=64, **SIZES))


def upcycled() -> PreTrainedModel:
    model = dense()
    upcycle(model, Experts(count=COUNT, top_k=TOP_K, layers="all"))
    return shaken(model)


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def qwen() -> PreTrainedModel:
    torch.manual_seed(0)
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(num_experts=COUNT, num_experts_per_tok=TOP_K, moe_intermediate_size=16, **heads, **SIZES)
    return shaken(Qwen3MoeForCausalLM(config))


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"num_local_experts": COUNT, "num_experts_per_tok": TOP_K, "intermediate_size": 16, "num_key_value_heads": 2}
    return shaken(MixtralForCausalLM(MixtralConfig(**sizes, **SIZES)))


def batch(rows: list[int]) -> dict[str, Tensor]:
    labels = IDS.masked_fill(torch.arange(9) >= LENGTH[:, None], -100)
    groups = torch.tensor(rows) // 2
    return {"input_ids": IDS[rows], "labels": labels[rows], LENGTHS: LENGTH[rows], GROUPS: groups - groups.min()}


def run(model: PreTrainedModel, shares: Shares = SHARES, loss: str = "full", scaler: Any = None) -> Any:
    """Gradients of one step, and what became of its routing."""
    model.zero_grad()
    routers_of(model).begin(model, shares)
    accumulate(model, [lambda: batch([0, 1, 2, 3])], LOSSES[loss], 26, scaler=scaler)
    return routers_of(model).conclude(model, routers_of(model).totals(model))


def expected(model: PreTrainedModel, balance: Balance) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy, and the sums of the layers' balance losses and z-losses, each from its definition."""
    logits: list[Tensor] = []
    gates = [m for n, m in model.named_modules() if n.endswith((".gate", ".router"))]
    handles = [
        gate.register_forward_hook(
            lambda module, given, out: logits.append(torch.nn.functional.linear(given[0].reshape(-1, 32), module.weight))
        )
        for gate in gates
    ]
    cross_entropy = LOSSES["full"](model, {name: batch([0, 1, 2, 3])[name] for name in ("input_ids", "labels")}, 26)
    for handle in handles:
        handle.remove()
    real = torch.arange(9) < LENGTH[:, None]
    groups = {"sequence": [[0], [1], [2], [3]], "group": [[0, 1], [2, 3]], "micro-batch": [[0, 1, 2, 3]], "bias": []}
    balances, squares = torch.zeros(()), torch.zeros(())
    for layer in logits:
        of_samples = layer.view(4, 9, COUNT)
        for group in groups[balance.kind]:
            tokens = torch.cat([of_samples[sample][real[sample]] for sample in group])
            each = 1 if balance.kind == "micro-batch" else TOP_K
            chosen = torch.zeros_like(tokens).scatter_(1, tokens.topk(each).indices, 1)
            fractions = chosen.mean(dim=0) / each
            balances = balances + COUNT * (fractions * tokens.softmax(dim=1).mean(dim=0)).sum() / len(groups[balance.kind])
        squares = squares + of_samples[real].logsumexp(dim=1).square().mean()
    return cross_entropy, balances, squares


BALANCES = {
    "sequence": Balance(kind="sequence", coefficient=0.5, z_loss=0.1),
    "group": Balance(kind="group", group=2, coefficient=0.5),
    "micro-batch": Balance(kind="micro-batch", coefficient=0.5),
    "bias": Balance(kind="bias", z_loss=0.1),
}


@pytest.mark.parametrize("kind", BALANCES)
@pytest.mark.parametrize("make", [upcycled, qwen, mixtral])
def test_gradients_and_losses_are_those_of_the_definition(make: Callable[[], PreTrainedModel], kind: str) -> None:
    balance = BALANCES[kind]
    if kind == "bias" and make is not upcycled:
        return
    model, twin = make(), make()
    apply_balance(model, balance)
    routed = run(model)
    cross_entropy, balances, squares = expected(twin, balance)
    (cross_entropy + (kind != "bias") * balance.coefficient * balances + balance.z_loss * squares).backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert routed.balance_loss == (None if kind == "bias" else pytest.approx(float(balances.detach()) / 2, rel=1e-5))
    assert routed.z_loss == (pytest.approx(float(squares.detach()) / 2, rel=1e-5) if balance.z_loss else None)
    assert [sum(load.total) for load in routed.experts] == [TOP_K * 30] * 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_recomputation_changes_neither_gradients_nor_counts(reentrant: bool, loss: str) -> None:
    plain, again = upcycled(), upcycled()
    for model in (plain, again):
        apply_balance(model, BALANCES["sequence"])
    again.activation_checkpointing_enable({"use_reentrant": reentrant})
    again.enable_input_require_grads()
    assert run(plain, loss=loss) == run(again, loss=loss)
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_scaler_scales_what_a_balance_adds() -> None:
    model = upcycled()
    apply_balance(model, BALANCES["sequence"])
    run(model)
    plain = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    run(model, scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    for gradient, parameter in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 256 * gradient)


def test_nothing_is_left_of_a_micro_batch_and_an_evaluation_is_left_alone() -> None:
    model = upcycled()
    apply_balance(model, BALANCES["sequence"])
    routed = run(model)
    assert routers_of(model).padded is None
    model(input_ids=IDS)
    model.eval()(input_ids=IDS)
    assert routers_of(model).conclude(model, routers_of(model).totals(model)) == routed


def test_a_micro_batch_without_tokens_adds_nothing() -> None:
    model = upcycled()
    apply_balance(model, BALANCES["sequence"])
    before = run(model)
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    empty = {"input_ids": IDS[:1], "labels": torch.full((1, 9), -100), LENGTHS: torch.zeros(1, dtype=torch.long)}
    accumulate(model, [lambda: dict(empty)], LOSSES["full"], 26)
    assert routers_of(model).conclude(model, routers_of(model).totals(model)) == before
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_a_mask_says_what_is_padding_where_lengths_do_not() -> None:
    model = upcycled()
    apply_balance(model, None)
    mask = (torch.arange(9) < LENGTH[:, None]).long()
    routers_of(model).begin(model, SHARES)
    accumulate(model, [lambda: {"input_ids": IDS, "labels": IDS, "attention_mask": mask}], LOSSES["full"], 30)
    routed = routers_of(model).conclude(model, routers_of(model).totals(model))
    assert [sum(load.total) for load in routed.experts] == [TOP_K * 30] * 2


def test_what_cannot_be_balanced_is_refused() -> None:
    sizes: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
    deepseek = DeepseekV3Config(first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, topk_group=1, **sizes, **SIZES)
    with torch.device("meta"):
        other, softmax = DeepseekV3ForCausalLM(deepseek), MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES))
    for model, balance, words in (
        (dense(), BALANCES["sequence"], "has none"),
        (other, BALANCES["sequence"], "routers do not give the softmax"),
        (softmax, BALANCES["bias"], "have no place for"),
    ):
        with pytest.raises(UserError, match=words):
            apply_balance(model, balance)
    apply_balance(softmax, BALANCES["sequence"])
    assert routers_of(softmax)


def test_a_model_without_experts_or_balance_stays_as_it_is() -> None:
    model = qwen()
    apply_balance(model, None)
    assert not routers_of(model)
    assert not any(module._forward_hooks for module in model.modules())
    upcycled_model = upcycled()
    apply_balance(upcycled_model, None)
    assert routers_of(upcycled_model)
    assert all(m.router.choice_bias is None for m in upcycled_model.modules() if isinstance(m, MixtureOfExperts))
    assert not [name for name in upcycled_model.state_dict() if "oomph" in name]


def test_a_bias_is_saved_with_the_model_and_goes_against_the_load() -> None:
    model = upcycled()
    apply_balance(model, BALANCES["bias"])
    routed = run(model)
    biases = [module.choice_bias for module in model.modules() if isinstance(module, Router)]
    assert sum("choice_bias" in name for name in model.state_dict()) == 2
    for bias, load in zip(biases, routed.experts, strict=True):
        assert bias is not None
        mean = sum(load.total) / COUNT
        assert bias.tolist() == pytest.approx([0.001 * ((mean > n) - (mean < n)) for n in load.total])


def test_samples_that_stay_together_are_admitted_as_one() -> None:
    admission = Admission(lambda shape: shape.samples * shape.tokens + shape.images, lambda shape: 1.0, 100)
    split = admission.split([Together(10, 3, 4), Together(12, 0, 2), Together(10, 1, 4)])
    assert split.micro_batches == ((1,), (0, 2)) or split.micro_batches == ((0, 1), (2,))
    assert sum(shape.samples for shape in split.shapes) == 10
    assert all(peak <= 100 for peak in split.peak_bytes)
