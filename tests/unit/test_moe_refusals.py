import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from oomph import recipe
from oomph.errors import UserError
from oomph.live.experts import Experts, MixtureOfExperts
from oomph.live.ffn import find_ffn
from oomph.live.moe import expert_layers, upcycle

HIDDEN, INNER, VOCAB = 32, 64, 96
SMALL = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tower() -> hf.CLIPVisionConfig:
    size = {"hidden_size": 16, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    return hf.CLIPVisionConfig(**size, num_hidden_layers=2, num_attention_heads=2)


def phi() -> nn.Module:
    with torch.device("meta"):
        return hf.PhiForCausalLM(hf.PhiConfig(**SMALL))


def section(layers: Any, count: int | list[int] = 4, top_k: int = 2, **more: Any) -> recipe.Experts:
    return recipe.Experts(count=count, top_k=top_k, layers=layers, **more)


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


class Plain(nn.Module):
    def __init__(self, bias: bool = True, act: str = "gelu_new", hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(hidden, inner, bias=bias), nn.Linear(inner, hidden, bias=bias)
        self.act = ACT2FN[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


class Gated(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, INNER, bias=bias), nn.Linear(HIDDEN, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=bias)
        self.act_fn = ACT2FN["silu"]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, ffn: nn.Module, name: str = "mlp") -> None:
        super().__init__()
        self.attention = nn.Linear(HIDDEN, HIDDEN)
        self.add_module(name, ffn)


@pytest.mark.parametrize("name", ["mlp", "feed_forward", "ffn"])
@pytest.mark.parametrize("form", [Plain, Gated])
@pytest.mark.parametrize("bias", [True, False])
def test_finds_plain_and_gated_ffns(name: str, form: Callable[..., nn.Module], bias: bool) -> None:
    ffn = form(bias=bias)
    assert find_ffn(Layer(ffn, name)) == (name, ffn)


def changed(forward: Callable[..., Any], base: type[nn.Module] = Plain) -> nn.Module:
    return type("Changed", (base,), {"forward": forward})()


def sparse_gemma() -> nn.Module:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": [INNER] * 2, "num_hidden_layers": 2}
    return Gemma3nTextMLP(Gemma3nTextConfig(**sizes, activation_sparsity_pattern=[0.9, 0.0]), layer_idx=0)


def clamped(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10.0)) * self.up_proj(x))


def dropping(self: Any, x: Tensor) -> Tensor:
    return nn.functional.dropout(Plain.forward(self, x), 0.01, self.training)


def scaled() -> nn.Module:
    ffn = Plain()
    ffn.scale = nn.Parameter(torch.ones(HIDDEN))
    return ffn


@pytest.mark.parametrize(
    "ffn",
    [
        lambda: changed(lambda self, x: 2 * Gated.forward(self, x), Gated),
        lambda: changed(lambda self, x, residual: Plain.forward(self, x) + residual),
        lambda: changed(lambda self, x: (Plain.forward(self, x), None)),
        lambda: changed(lambda self, x: Plain.forward(self, x.view(-1, HIDDEN))),
        lambda: changed(clamped, Gated),
        lambda: changed(dropping),
        lambda: changed(dropping).eval(),
        scaled,
        sparse_gemma,
        lambda: Plain(inner=60),
        lambda: nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(HIDDEN, INNER)),
        lambda: nn.Sequential(nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)),
        lambda: nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN), nn.Dropout()),
        lambda: nn.Sequential(nn.Linear(HIDDEN, INNER), nn.PReLU(), nn.Linear(INNER, HIDDEN)),
        lambda: nn.Linear(HIDDEN, HIDDEN),
    ],
)
def test_refuses_an_ffn_that_computes_something_else(ffn: Callable[[], nn.Module]) -> None:
    layer = Layer(ffn())
    training = layer.mlp.training
    with pytest.raises(UserError, match=r"no FFN that experts can be made of.*attention \(Linear\), mlp") as caught:
        find_ffn(layer)
    assert "activation" in caught.value.hint
    assert layer.mlp.training == training


def test_the_check_of_an_ffn_leaves_random_state_and_weights_alone() -> None:
    layer = Layer(Plain().train())
    state, weights = torch.get_rng_state(), copy.deepcopy(layer.state_dict())
    find_ffn(layer)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(layer.state_dict(), weights, rtol=0, atol=0)


def test_an_ffn_without_its_form_is_refused_by_experts_too() -> None:
    with pytest.raises(UserError, match="Linear is not an FFN"):
        Experts(nn.Linear(HIDDEN, HIDDEN), 4)


@pytest.mark.parametrize(
    ("layers", "total", "expected"),
    [
        ("alternate", 32, list(range(0, 32, 2))),
        ("alternate", 5, [0, 2, 4]),
        ("first_half", 5, [0, 1]),
        ("second_half", 5, [2, 3, 4]),
        ("all", 3, [0, 1, 2]),
        ([3, 0], 4, [0, 3]),
    ],
)
def test_expert_layers(layers: Any, total: int, expected: list[int]) -> None:
    assert expert_layers(total, layers) == expected


@pytest.mark.parametrize(
    ("layers", "problems"),
    [
        ([4, -1, 2], ["layer -1 does not exist", "layer 4 does not exist"]),
        ([1, 1, 3, 9, 9], ["layer 1 is listed 2 times", "layer 9 is listed 2 times", "layer 9 does not exist"]),
        ([], ["select none of the 4"]),
        ("sparse", ["is none of alternate, first_half, second_half, all"]),
        ([0, 1.0], ["not a list of whole numbers"]),
        ([True], ["not a list of whole numbers"]),
        (2, ["not a list of whole numbers"]),
    ],
)
def test_expert_layers_that_cannot_be(layers: Any, problems: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        expert_layers(4, layers)
    assert len(caught.value.problems) == len(problems)
    for actual, expected in zip(caught.value.problems, problems, strict=True):
        assert expected in actual
    assert "alternate" in caught.value.hint


def test_half_of_one_layer_is_none() -> None:
    with pytest.raises(UserError, match="select none of the 1"):
        expert_layers(1, "first_half")


@pytest.mark.parametrize(
    ("count", "layers", "problems"),
    [
        (4, [7, 1], ["layer 7 does not exist"]),
        ([4, 4, 2], "alternate", ["lists 3 numbers of experts, and 2 layers get some: 0, 2"]),
        ([4], [1, 9], ["layer 9 does not exist"]),
    ],
)
def test_upcycle_reports_layers_that_do_not_exist_and_counts_for_others(count: Any, layers: Any, problems: list[str]) -> None:
    model = phi()
    with pytest.raises(UserError) as caught:
        upcycle(model, section(layers, count))
    for actual, expected in zip(caught.value.problems, problems, strict=True):
        assert expected in actual
    assert not mixtures(model)


def test_upcycle_twice_is_refused_and_changes_nothing() -> None:
    model = phi()
    upcycle(model, section([1, 3]))
    before = mixtures(model)
    with pytest.raises(UserError, match="decoder layers 1, 3: PhiDecoderLayer already holds experts"):
        upcycle(model, section("all"))
    assert mixtures(model) == before


def starcoder2(dropout: float) -> nn.Module:
    return hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**SMALL, residual_dropout=dropout))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Plain(), "Plain is not a transformers model with a language model"),
        (lambda: hf.CLIPVisionModel(tower()), "CLIPVisionModel is not a transformers model with a language model"),
        (lambda: hf.PhiForCausalLM(hf.PhiConfig(**{**SMALL, "num_hidden_layers": 0})), "found: none"),
        (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, num_key_value_heads=4)), "already holds experts"),
        (lambda: hf.OPTForCausalLM(hf.OPTConfig(**SMALL, ffn_dim=INNER, word_embed_proj_dim=HIDDEN)), r"fc1 \(Linear\)"),
        (lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=HIDDEN, num_layers=1)), "T5Block has no FFN"),
        (lambda: starcoder2(0.1), "Starcoder2DecoderLayer has no FFN"),
    ],
)
def test_models_that_cannot_be_converted(make: Callable[[], nn.Module], problem: str) -> None:
    with torch.device("meta"):
        model = make()
    with pytest.raises(UserError, match=problem) as caught:
        upcycle(model, section("all"))
    assert len(caught.value.problems) == 1
    assert not mixtures(model)


def test_starcoder2_without_dropout_converts() -> None:
    with torch.device("meta"):
        model = starcoder2(0.0)
    assert upcycle(model, section("first_half")) == [0, 1]
