import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2FN

from oomph import recipe
from oomph.live import moe
from oomph.live.experts import Experts, MixtureOfExperts, Router
from oomph.live.moe import converted_layers, decoder_layers, upcycle
from oomph.live.residual import ResidualExperts

HIDDEN, INNER, VOCAB, IMAGE = 32, 64, 96, 95
SMALL = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PHI = hf.PhiConfig(**SMALL)
LLAMA = hf.LlamaConfig(**SMALL)


def tower() -> hf.CLIPVisionConfig:
    size = {"hidden_size": 16, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    return hf.CLIPVisionConfig(**size, num_hidden_layers=2, num_attention_heads=2)


def llava_config() -> hf.LlavaConfig:
    return hf.LlavaConfig(vision_config=tower(), text_config=PHI, image_token_index=IMAGE, tie_word_embeddings=False)


BUILDERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "phi": lambda: hf.PhiForCausalLM(copy.deepcopy(PHI)),
    "llama": lambda: hf.LlamaForCausalLM(copy.deepcopy(LLAMA)),
    "llava": lambda: hf.LlavaForConditionalGeneration(llava_config()),
}


def seeded(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(kind: str) -> hf.PreTrainedModel:
    """A tiny model whose biases and weights are large enough to matter in its output."""
    torch.manual_seed(0)
    model = BUILDERS[kind]()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(seeded(tuple(parameter.shape), number), alpha=0.05)
    return model.train()


def batch(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(3, IMAGE, (2, 9), generator=torch.Generator().manual_seed(1))
    if kind != "llava":
        return {"input_ids": ids, "labels": ids}
    ids[:, 1:5] = IMAGE
    return {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100), "pixel_values": seeded((2, 3, 28, 28))}


def section(layers: Any, count: int | list[int] = 4, top_k: int = 2, **more: Any) -> recipe.Experts:
    return recipe.Experts(count=count, top_k=top_k, layers=layers, **more)


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def randomise(model: nn.Module, experts: bool = True) -> None:
    """Router weights that spread the tokens, and experts that differ."""
    with torch.no_grad():
        for seed, mixture in enumerate(mixtures(model)):
            mixture.router.weight.copy_(seeded(tuple(mixture.router.weight.shape), seed))
            for number, parameter in enumerate(mixture.experts.parameters() if experts else ()):
                parameter.add_(seeded(tuple(parameter.shape), number), alpha=0.1)


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


def slow_reference(mixture: MixtureOfExperts, hidden: Tensor) -> Tensor:
    """One token and one expert at a time."""
    held, results = mixture.experts, []
    for token in hidden.reshape(-1, hidden.shape[-1]):
        chances = torch.exp(mixture.router.weight @ token)
        best = sorted(range(held.count), key=lambda e: -chances[e].item())[: mixture.router.top_k]
        total = sum(chances[e] for e in best)
        result = torch.zeros_like(token)
        for e in best:
            values = {}
            for part in ("gate_proj", "up_proj"):
                if hasattr(held, part):
                    bias = getattr(held, f"{part}_bias")
                    values[part] = getattr(held, part)[e] @ token + (0 if bias is None else bias[e])
            inner = held.activation(values["gate_proj" if held.gated else "up_proj"])
            inner = inner * values["up_proj"] if held.gated else inner
            out = held.down_proj[e] @ inner + (0 if held.down_proj_bias is None else held.down_proj_bias[e])
            result = result + chances[e] / total * out
        results.append(result)
    return torch.stack(results).view(hidden.shape)


FFNS = {
    "plain": Plain,
    "plain-no-bias": lambda: Plain(bias=False, act="relu"),
    "gated": Gated,
    "gated-bias": lambda: Gated(bias=True),
}


def mixture_of(form: str, count: int = 4, top_k: int = 2) -> MixtureOfExperts:
    torch.manual_seed(0)
    mixture = MixtureOfExperts(FFNS[form](), count, top_k)
    randomise(mixture)
    return mixture


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("layers", ["alternate", "all"])
def test_conversion_keeps_the_output_for_any_router(kind: str, layers: str) -> None:
    model = build(kind)
    before = model(**batch(kind))
    converted = upcycle(model, section(layers))
    randomise(model, experts=False)
    after = model(**batch(kind))
    assert converted == ([0, 2] if layers == "alternate" else [0, 1, 2, 3])
    assert len(mixtures(model)) == len(converted)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-5, atol=0)
    randomise(model)
    assert not torch.allclose(model(**batch(kind)).logits, before.logits, rtol=1e-2)


FAMILIES: dict[str, dict[str, Any]] = {
    "Cohere": {"num_key_value_heads": 4},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "GPTNeoX": {},
    "Granite": {"num_key_value_heads": 2},
    "Llama": {"mlp_bias": True},
    "Mistral": {"num_key_value_heads": 2},
    "Olmo2": {"num_key_value_heads": 2},
    "Phi": {"qk_layernorm": True},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "StableLm": {"num_key_value_heads": 2, "use_parallel_residual": True},
    "Starcoder2": {"num_key_value_heads": 2, "residual_dropout": 0.0},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("residual", [False, True])
def test_any_family_of_models_computes_what_it_did(family: str, residual: bool) -> None:
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**(SMALL | {"num_hidden_layers": 2} | FAMILIES[family]))
    model = getattr(hf, f"{family}ForCausalLM")(config).eval()
    ids = batch("llama")["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        upcycle(model, section("all", count=[3, 4], residual=residual))
        after = model(ids).logits
        randomise(model)
        other = model(ids).logits
    assert [mixture.experts.count for mixture in mixtures(model)] == [3, 4]
    torch.testing.assert_close(after, before, rtol=0, atol=3e-6 * before.abs().max().item())
    assert not torch.allclose(other, before, rtol=1e-2)


def test_a_single_expert_has_the_weight_one() -> None:
    model = build("phi")
    before = model(**batch("phi")).logits
    upcycle(model, section("all", top_k=1))
    randomise(model, experts=False)
    torch.testing.assert_close(model(**batch("phi")).logits, before, rtol=1e-5, atol=1e-5)


def test_residual_experts_are_those_of_deepspeed() -> None:
    torch.manual_seed(0)
    mixture = mixture_of("plain")
    residual = ResidualExperts(Plain(), mixture)
    hidden = seeded((2, 5, HIDDEN), 3)
    shares = residual.coefficient(hidden).softmax(dim=-1)
    expected = mixture(hidden) * shares[..., 0:1] + residual.dense(hidden) * shares[..., 1:]
    torch.testing.assert_close(residual(hidden), expected)
    residual(hidden).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in residual.parameters())
    torch.testing.assert_close(residual.bfloat16()(hidden.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


def test_the_dense_ffn_stays_itself_beside_its_copies() -> None:
    model = build("phi")
    dense = [layer.mlp for layer in decoder_layers(model)]
    upcycle(model, section("alternate", residual=True, noise=0.5))
    kept = [layer.mlp.dense for layer in decoder_layers(model) if isinstance(layer.mlp, ResidualExperts)]
    assert [id(ffn) for ffn in kept] == [id(dense[0]), id(dense[2])]
    assert not torch.equal(kept[0].fc1.weight, mixtures(model)[0].experts.up_proj[0])
    assert [layer.path for layer in converted_layers(model)] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert converted_layers(model)[0].mixture_path == "model.layers.0.mlp.mixture"


@pytest.mark.parametrize("kind", BUILDERS)
def test_gradients_reach_router_and_every_expert_in_use(kind: str) -> None:
    model = build(kind)
    upcycle(model, section("alternate"))
    randomise(model)
    model(**batch(kind)).loss.backward()
    for mixture in mixtures(model):
        assert mixture.router.weight.grad is not None
        assert (mixture.router.weight.grad.abs().sum(dim=1) > 0).all()
        for parameter in mixture.experts.parameters():
            assert parameter.grad is not None
            assert parameter.grad.is_contiguous()
            assert (parameter.grad.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("form", FFNS)
@pytest.mark.parametrize(("count", "top_k"), [(4, 2), (8, 3), (3, 3)])
def test_outputs_and_gradients_agree_with_a_loop_over_tokens_and_experts(form: str, count: int, top_k: int) -> None:
    mixture = mixture_of(form, count, top_k)
    twin = copy.deepcopy(mixture)
    hidden, direction = seeded((2, 5, HIDDEN), 3), seeded((2, 5, HIDDEN), 4)
    inputs, twin_inputs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    actual, expected = mixture(inputs), slow_reference(twin, twin_inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    (actual * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(inputs.grad, twin_inputs.grad, rtol=1e-4, atol=1e-5)
    for (name, mine), theirs in zip(mixture.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", FFNS)
def test_bfloat16_goes_through_grouped_mm_and_agrees_with_float32(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    grouped_mm = nn.functional.grouped_mm
    monkeypatch.setattr(nn.functional, "grouped_mm", lambda a, b, offs: calls.append(offs.dtype) or grouped_mm(a, b, offs=offs))
    half = mixture_of(form).bfloat16()
    full = copy.deepcopy(half).float()
    hidden = seeded((2, 20, HIDDEN), 3, torch.bfloat16)
    direction = seeded((2, 20, HIDDEN), 4, torch.bfloat16)
    actual, expected = half(hidden), full(hidden.float())
    assert actual.dtype == torch.bfloat16
    assert calls == [torch.int32] * (3 if half.experts.gated else 2)
    (actual * direction).sum().backward()
    (expected * direction.float()).sum().backward()
    relative = [((actual - expected).norm() / expected.norm()).item()]
    for mine, theirs in zip(half.parameters(), full.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        relative.append(((mine.grad - theirs.grad).norm() / theirs.grad.norm()).item())
    assert max(relative) < 0.02


def test_autocast_computes_the_experts_in_its_dtype() -> None:
    mixture = mixture_of("plain")
    hidden = seeded((1, 20, HIDDEN), 3)
    expected = mixture(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        actual = mixture(hidden)
    assert actual.dtype == torch.bfloat16
    assert ((actual - expected).norm() / expected.norm()).item() < 0.03
    actual.float().sum().backward()
    assert {parameter.grad.dtype for parameter in mixture.parameters() if parameter.grad is not None} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_without_tokens_gets_a_zero_gradient(dtype: torch.dtype) -> None:
    mixture = mixture_of("plain").to(dtype)
    with torch.no_grad():
        mixture.router.weight.copy_(torch.tensor([2.0, -9.0, 1.0, -9.0]).outer(torch.ones(HIDDEN)))
    mixture(torch.ones(1, 3, HIDDEN, dtype=dtype)).float().square().sum().backward()
    for parameter in mixture.experts.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.flatten(1).abs().sum(dim=1) > 0).tolist() == [True, False, True, False]


def test_router_weights_sum_to_one_over_the_most_likely_experts() -> None:
    router = Router(HIDDEN, 8, 3)
    hidden = seeded((50, HIDDEN), 2) * 4
    weights, chosen = router(hidden)
    chances = (hidden @ router.weight.T).softmax(dim=-1)
    assert chosen.tolist() == chances.argsort(dim=-1, descending=True)[:, :3].tolist()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(50))
    torch.testing.assert_close(weights[:, 0] / weights[:, 2], chances.gather(1, chosen)[:, 0] / chances.gather(1, chosen)[:, 2])
    assert Router(HIDDEN, 8, 3, dtype=torch.bfloat16)(hidden.bfloat16())[0].dtype == torch.float32


def test_equal_experts_give_the_router_no_gradient() -> None:
    mixture = MixtureOfExperts(Plain(), 4, 2).double()
    mixture(seeded((1, 30, HIDDEN), 3, torch.float64)).square().sum().backward()
    assert mixture.router.weight.grad is not None
    assert mixture.router.weight.grad.abs().max().item() < 1e-6


def test_one_token_and_other_ranks_of_input_work() -> None:
    mixture = mixture_of("gated")
    hidden = seeded((6, HIDDEN), 3)
    together = mixture(hidden)
    torch.testing.assert_close(mixture(hidden.view(1, 2, 3, HIDDEN)).view(6, HIDDEN), together)
    torch.testing.assert_close(torch.stack([mixture(token[None])[0] for token in hidden]), together)


def test_the_copies_keep_device_dtype_flags_and_mode() -> None:
    with torch.device("meta"):
        dense = Plain().bfloat16().eval()
    dense.first.weight.requires_grad_(False)
    mixture = MixtureOfExperts(dense, 4, 2)
    shapes = {name: tuple(parameter.shape) for name, parameter in mixture.named_parameters()}
    assert shapes == {
        "experts.up_proj": (4, INNER, HIDDEN),
        "experts.up_proj_bias": (4, INNER),
        "experts.down_proj": (4, HIDDEN, INNER),
        "experts.down_proj_bias": (4, HIDDEN),
        "router.weight": (4, HIDDEN),
    }
    assert {(p.device.type, p.dtype) for p in mixture.parameters()} == {("meta", torch.bfloat16)}
    assert [name for name, p in mixture.named_parameters() if not p.requires_grad] == ["experts.up_proj"]
    assert not any(module.training for module in mixture.modules())


def test_copies_share_no_memory_with_the_dense_ffn() -> None:
    dense = Plain()
    held = Experts(dense, 1)
    assert {p.untyped_storage().data_ptr() for p in held.parameters()}.isdisjoint(
        p.untyped_storage().data_ptr() for p in dense.parameters()
    )


def test_checkpointing_recomputes_to_the_same_gradients() -> None:
    model = build("llava")
    upcycle(model, section("alternate"))
    randomise(model)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        calls: list[nn.Module] = []
        for mixture in mixtures(model):
            mixture.register_forward_pre_hook(lambda module, *_, calls=calls: calls.append(module))
        model(**batch("llava"), use_cache=False).loss.backward()
        assert len(calls) == (4 if checkpointed else 2)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7)


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Fake tensors on the CPU for parameters and buffers on the meta device; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        fake = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
                        made[id(tensor)] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
                    held[name] = made[id(tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_runs_forward_and_backward_on_fake_tensors(
    kind: str, dtype: torch.dtype, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    with torch.device("meta"):
        model = BUILDERS[kind]().to(dtype).train()
    upcycle(model, section("alternate"))
    if checkpointed:
        model.activation_checkpointing_enable()
    mode = FakeTensorMode()
    to_fake(model, mode)
    inputs = {name: mode.from_tensor(t.to(dtype) if t.is_floating_point() else t) for name, t in batch(kind).items()}
    with mode:
        model(**inputs, use_cache=False).loss.backward()
    for mixture in mixtures(model):
        for parameter in mixture.parameters():
            assert isinstance(parameter.grad, FakeTensor)
            assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, dtype)


def test_converts_inside_a_fake_mode() -> None:
    with FakeTensorMode():
        model = BUILDERS["phi"]()
        assert upcycle(model, section("all")) == [0, 1, 2, 3]
    assert all(isinstance(p, FakeTensor) for mixture in mixtures(model) for p in mixture.parameters())


@pytest.mark.parametrize("tokens", [128, 512])
def test_memory_grows_with_tokens_times_top_k(tokens: int) -> None:
    with torch.device("meta"):
        mixture = MixtureOfExperts(Plain().bfloat16(), 4, 2)
    mode = FakeTensorMode()
    to_fake(mixture, mode)
    with mode:
        hidden = torch.empty(1, tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        with Largest() as largest:
            mixture(hidden).sum().backward()
    assert largest.elements == tokens * 2 * INNER


def test_counts_of_phi_2_at_full_size() -> None:
    size = {"vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240}
    depth = {"num_hidden_layers": 32, "num_attention_heads": 32}
    text = hf.PhiConfig(**size, **depth, partial_rotary_factor=0.4, bos_token_id=50256, eos_token_id=50256)
    config = hf.LlavaConfig(vision_config=tower(), text_config=text, image_token_index=51199, tie_word_embeddings=False)
    config.vision_config.hidden_size = 1024
    with torch.device("meta"):
        model = hf.LlavaForConditionalGeneration(config).bfloat16()
    dense = count(model)
    assert upcycle(model, section("alternate")) == list(range(0, 32, 2))
    experts = sum(count(mixture.experts) for mixture in mixtures(model))
    routers = sum(count(mixture.router) for mixture in mixtures(model))
    assert experts == 64 * 52_441_600
    assert routers == 163_840
    assert count(model) - dense == 48 * 52_441_600 + 163_840
    # 51,200 fewer than Phi-2 and projector by themselves: LLaVA's head has no bias.
    assert count(model) - count(model.model.vision_tower) == 5_306_173_440


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_vision_tower_and_other_layers_stay_dense() -> None:
    model = build("llava")
    upcycle(model, section([1]))
    converted = [name for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)]
    assert converted == ["model.language_model.layers.1.mlp"]
    assert decoder_layers(model) is model.model.language_model.layers


def test_only_one_layer_exists_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("phi")
    dense = [weakref.ref(layer.mlp) for layer in decoder_layers(model)]
    alive: list[int] = []

    class Watched(MixtureOfExperts):
        def __init__(self, *args: Any) -> None:
            gc.collect()
            alive.append(sum(ref() is not None for ref in dense))
            super().__init__(*args)

    monkeypatch.setattr(moe, "MixtureOfExperts", Watched)
    upcycle(model, section("all"))
    assert alive == [4, 3, 2, 1]
    gc.collect()
    assert not any(ref() for ref in dense)
