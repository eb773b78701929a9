"""Models with experts from stage to stage: made of dense ones, saved, loaded by transformers, and trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MistralConfig,
    PhiConfig,
    Qwen3Config,
    StableLmConfig,
)

from oomph.errors import UserError
from oomph.live import weights
from oomph.live.budget import LiveStorages
from oomph.live.experts import Router
from oomph.live.export import save_model
from oomph.live.generate import open_answerer
from oomph.live.model import part_finder, read_config
from oomph.live.moe import converted_layers
from oomph.live.source import build_model, read_model_config
from oomph.live.weights import build_stage_model, fill, saved_weights

ALIGN = {"vision": "frozen", "language": "frozen", "head": "frozen", "projector": 1e-3}
TRAIN = {"language": "frozen", "head": "frozen", "experts": 1e-4, "router": 1e-4}
EYES = {"vision": "frozen", "projector": "frozen", **TRAIN}
FOUR = {"count": 4, "top_k": 2, "layers": "all"}
EVERY_OTHER = {"count": 4, "top_k": 2}

Logits = Callable[..., torch.Tensor]


def text(shop: Any, name: str = "language", experts: Any = None, **more: Any) -> Any:
    """A recipe for a language model, which makes experts where it is told of any."""
    sections = {} if experts is None else {"experts": experts}
    return shop.recipe(more.pop("train", TRAIN), model=str(shop.folder / name), **sections, **more)


def changed(model: Any) -> Any:
    """The model with weights that training might have left: experts that differ, routers that choose."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter)
    return model


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (None, {}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 16}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 24}),
    "phi": (PhiConfig, {}),
    "stablelm": (StableLmConfig, {"num_key_value_heads": 2}),
    "llama-bias": (None, {"mlp_bias": True}),
}


@pytest.fixture(scope="module", autouse=True)
def _languages(shop: Any) -> None:
    for name, (kind, sizes) in KINDS.items():
        shop.save_language(name, **({} if kind is None else {"kind": kind}), **sizes)


# From dense to experts.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
def test_a_stage_with_experts_begins_with_what_the_dense_model_computes(
    shop: Any, kind: str, residual: bool, logits: Logits
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(shop.folder / kind)
    model = shop.build(text(shop, kind, {"count": [4, 3], "top_k": 2, "layers": "all", "residual": residual}))
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=2e-6)
    assert [layer.experts.count for layer in converted_layers(model)] == [4, 3]
    assert not any(parameter.is_meta for parameter in model.parameters())
    part = part_finder(model)
    parts = {name: part(name) for name, _ in model.named_parameters() if ".mlp." in name}
    wanted = {"experts", "router", "language"} if residual else {"experts", "router"}
    assert set(parts.values()) == wanted
    assert {place for name, place in parts.items() if ".coefficient." in name} == ({"router"} if residual else set())
    assert {place for name, place in parts.items() if ".dense." in name} == ({"language"} if residual else set())


@pytest.mark.parametrize("top_k", [1, 3])
def test_any_top_k_begins_with_what_the_dense_model_computes(shop: Any, top_k: int, logits: Logits) -> None:
    dense = AutoModelForCausalLM.from_pretrained(shop.folder / "phi")
    balance = {"kind": "sequence"}
    model = shop.build(text(shop, "phi", {"count": 3, "top_k": top_k, "layers": "all"}, balance=balance))
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=2e-6)


def test_the_stage_before_gives_the_weights_of_a_model_with_eyes(
    shop: Any, encoder_of: Any, tmp_path: Path, logits: Logits
) -> None:
    align, moe = shop.recipe(ALIGN), shop.recipe(EYES, experts=EVERY_OTHER)
    before = changed(shop.build(align))
    save_model(before, tmp_path / "align", align, encoder_of(align))
    model = shop.build(moe, tmp_path / "align")
    image_token = model.config.image_token_id
    torch.testing.assert_close(logits(model, image_token), logits(before, image_token), rtol=0, atol=2e-6)
    assert [layer.number for layer in converted_layers(model)] == [0]
    new = shop.build(shop.recipe(EYES, experts=EVERY_OTHER, weights="random"))
    assert not any(parameter.is_meta for parameter in new.parameters())


def test_noise_is_measured_in_deviations_of_the_weights_and_comes_from_the_seed(shop: Any) -> None:
    quiet, first, again, other = (
        shop.build(text(shop, "phi", FOUR | {"noise": noise}), seed=seed)
        for noise, seed in ((0.0, 1), (0.5, 1), (0.5, 1), (0.5, 2))
    )
    for plain, noisy, same, different in zip(*map(converted_layers, (quiet, first, again, other)), strict=True):
        for part in ("up_proj", "down_proj"):
            dense, given = getattr(plain.experts, part), getattr(noisy.experts, part)
            added = (given - dense) / dense[0].std()
            assert abs(added.std().item() - 0.5) < 0.03
            assert not torch.equal(added[0], added[1])
            assert torch.equal(given, getattr(same.experts, part))
            assert not torch.equal(given, getattr(different.experts, part))
        assert torch.equal(noisy.experts.up_proj_bias, plain.experts.up_proj_bias)


def test_upcycling_takes_the_models_own_memory_and_that_of_a_layer(shop: Any) -> None:
    shop.save_language("deep", num_hidden_layers=8, hidden_size=64, intermediate_size=256)
    key = shop.key(text(shop, "deep", FOUR))
    structure = build_model(key, read_model_config(key))
    dense = AutoModelForCausalLM.from_pretrained(shop.folder / "deep")
    layer = sum(p.nbytes for p in dense.model.layers[0].parameters())
    whole = sum(p.nbytes for p in structure.parameters())
    total = sum(p.nbytes for p in dense.parameters())
    del dense
    model = build_stage_model(key, text(shop, "deep", FOUR))
    origin = saved_weights_of_dense(shop, structure)
    with LiveStorages(held=list(origin.values())) as memory:
        fill(structure, origin, torch.device("cpu"))
        assert abs(memory.allocated_bytes - whole) < 0.01 * whole
    assert whole > 3 * total
    assert memory.peak_bytes <= whole + layer
    for mine, theirs in zip(structure.parameters(), model.parameters(), strict=True):
        assert mine.shape == theirs.shape


def saved_weights_of_dense(shop: Any, structure: Any) -> dict[str, torch.Tensor]:
    """What `build_stage_model` fills an upcycled structure with."""
    origin = saved_weights(structure, shop.folder / "deep", lambda sentence: None)
    weights._make_experts(origin.tensors, converted_layers(structure))
    return origin.tensors


# Saved, and loaded without us.

ARCHITECTURES = [
    ("llama", FOUR, "MixtralForCausalLM"),
    ("mistral", FOUR, "MixtralForCausalLM"),
    ("qwen3", FOUR, "Qwen3MoeForCausalLM"),
    ("qwen3", EVERY_OTHER, "Qwen3MoeForCausalLM"),
    ("llama", EVERY_OTHER, "OomphMoe"),
    ("llama", FOUR | {"residual": True}, "OomphMoe"),
    ("llama", {**FOUR, "count": [4, 2]}, "OomphMoe"),
    ("llama-bias", FOUR, "OomphMoe"),
    ("phi", FOUR | {"residual": True}, "OomphMoe"),
    ("stablelm", EVERY_OTHER, "OomphMoe"),
]
ALONE = """
import sys
sys.modules["oomph"] = None
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
for given in sys.argv[1:]:
    folder, kind, eyes = given.split(",")
    auto = AutoModelForImageTextToText if eyes else AutoModelForCausalLM
    model = auto.from_pretrained(folder, **({"trust_remote_code": True} if kind == "OomphMoe" else {})).eval()
    assert type(model).__name__ == kind, type(model)
    inputs = torch.load(folder + "/given.pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder + "/found.pt")
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
"""


def test_transformers_alone_loads_it_and_computes_the_same(
    shop: Any, encoder_of: Any, tmp_path: Path, logits: Logits
) -> None:
    arguments, wanted = [], []
    for number, (kind, experts, name) in enumerate(ARCHITECTURES):
        recipe, folder = text(shop, kind, experts), tmp_path / f"m{number}"
        model = changed(shop.build(recipe))
        save_model(model, folder, recipe, encoder_of(recipe))
        torch.save({"input_ids": torch.arange(80).view(2, 40) + 10}, folder / "given.pt")
        wanted.append(logits(model))
        arguments.append(f"{folder},{name},")
    for number, (language, name) in enumerate((("llama", "LlavaForConditionalGeneration"), ("phi", "OomphMoe"))):
        recipe, folder = shop.recipe(EYES, language=language, experts=FOUR), tmp_path / f"eyes{number}"
        model = changed(shop.build(recipe))
        save_model(model, folder, recipe, encoder_of(recipe))
        ids = torch.arange(80).view(2, 40) + 10
        ids[0, :16] = model.config.image_token_id
        torch.manual_seed(5)
        torch.save({"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}, folder / "given.pt")
        wanted.append(logits(model, model.config.image_token_id))
        arguments.append(f"{folder},{name},eyes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for argument, expected in zip(arguments, wanted, strict=True):
        folder = Path(argument.split(",")[0])
        found = torch.load(folder / "found.pt")
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6, msg=lambda text, name=argument: f"{name}: {text}")


def test_a_matching_architecture_is_saved_by_its_published_names(shop: Any, encoder_of: Any, tmp_path: Path) -> None:
    recipe = text(shop, "llama", FOUR)
    save_model(shop.build(recipe), tmp_path, recipe, encoder_of(recipe))
    names = set(reading_names(tmp_path))
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 4, 2)
    assert "upcycled" not in config
    assert not list(tmp_path.glob("modeling_*"))


def reading_names(folder: Path) -> list[str]:
    """The names in a folder's safetensors file."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


# Trained on.


@pytest.mark.parametrize(("kind", "experts"), [("llama", FOUR), ("qwen3", EVERY_OTHER), ("phi", FOUR | {"residual": True})])
def test_the_next_stage_goes_on_with_the_experts(
    shop: Any, encoder_of: Any, tmp_path: Path, kind: str, experts: Any, logits: Logits
) -> None:
    recipe = text(shop, kind, experts)
    model = changed(shop.build(recipe))
    expected = logits(model)
    save_model(model, tmp_path / "moe", recipe, encoder_of(recipe))
    for following in (text(shop, kind), text(shop, kind, experts)):
        again = shop.build(following, tmp_path / "moe")
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=2e-6)
        assert [layer.experts.count for layer in converted_layers(again)] == [4] * len(converted_layers(model))
    from_there = shop.recipe(TRAIN, model=str(tmp_path / "moe"))
    alone = changed(shop.build(from_there))
    save_model(alone, tmp_path / "again", from_there, encoder_of(from_there))
    last = shop.build(shop.recipe(TRAIN, model=str(tmp_path / "again")))
    torch.testing.assert_close(logits(last), logits(alone), rtol=0, atol=2e-6)


def test_a_choice_bias_is_saved_and_goes_on(shop: Any, encoder_of: Any, tmp_path: Path, logits: Logits) -> None:
    recipe = text(shop, "llama", FOUR)
    model = changed(shop.build(recipe))
    without = logits(model)
    for number, router in enumerate(module for module in model.modules() if isinstance(module, Router)):
        router.choice_bias = torch.tensor([2.0, -1.0, 0.5, -2.0]) * (number + 1)
    expected = logits(model)
    assert not torch.allclose(expected, without)
    save_model(model, tmp_path, recipe, encoder_of(recipe))
    assert json.loads((tmp_path / "config.json").read_text())["upcycled"]["choice_bias"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-6)
    for following, previous in ((recipe, tmp_path), (shop.recipe(TRAIN, model=str(tmp_path)), None)):
        torch.testing.assert_close(logits(shop.build(following, previous)), expected, rtol=0, atol=2e-6)


def test_adapters_on_experts_are_merged(shop: Any, encoder_of: Any, tmp_path: Path, logits: Logits) -> None:
    lora = {"rank": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.up_proj", "experts.down_proj"]}
    train = {"language": "frozen", "head": "frozen", "experts": "frozen", "router": 1e-3, "lora": 1e-3}
    recipe = text(shop, "llama", FOUR, train=train, lora=lora)
    model = changed(shop.build(recipe))
    save_model(model, tmp_path, recipe, encoder_of(recipe), shop.folder / "llama")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "MixtralForCausalLM"
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_a_saved_model_with_experts_answers(shop: Any, encoder_of: Any, tmp_path: Path) -> None:
    recipe = shop.recipe(EYES, language="phi", experts=EVERY_OTHER, projector="pool_linear")
    model = changed(shop.build(recipe))
    save_model(model, tmp_path, recipe, encoder_of(recipe))
    config = read_config(tmp_path)
    assert (config.projector, config.upcycled["path"]) == ("pool_linear", "model.language_model.layers.{}.mlp")
    answerer = open_answerer(str(tmp_path), 1, lambda sentence: None)
    assert type(answerer._model).__name__ == "OomphMoe"
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=False)


# Mistakes, found before any weight is read.


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"count": 2, "top_k": 2, "layers": "all"}, "has 4 experts, and the stage asks for 2"),
        (EVERY_OTHER, "has experts in the layers 0, 1, and the stage asks for 0"),
        (FOUR | {"residual": True}, "has no dense blocks beside its experts, and the stage asks for residual: true"),
        (FOUR | {"layers": [0, 7]}, "layer 7 does not exist"),
        (FOUR | {"count": [4, 4, 4]}, "lists 3 numbers of experts, and 2 layers get some"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_other_experts_than_there_are_is_an_error(
    shop: Any, tmp_path: Path, moe_folders: dict[str, Path], kind: str, asked: Any, problem: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(weights, "read_weights", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=problem):
        shop.build(text(shop, kind, asked), moe_folders[kind])
    with pytest.raises(UserError, match=problem):
        shop.build(shop.recipe(TRAIN, model=str(moe_folders[kind]), experts=asked))


@pytest.fixture(scope="module")
def moe_folders(shop: Any, encoder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in ("llama", "phi"):
        recipe, folder = text(shop, kind, FOUR), tmp_path_factory.mktemp(kind)
        save_model(shop.build(recipe), folder, recipe, encoder_of(recipe))
        found[kind] = folder
    return found


def test_capacity_is_planned_and_not_trained(shop: Any) -> None:
    with pytest.raises(UserError, match=r"experts\.dispatch capacity is planned and not trained"):
        shop.build(text(shop, "llama", FOUR | {"dispatch": "capacity"}))


def test_top_k_of_a_model_with_experts_may_change_where_its_class_is_ours(
    shop: Any, moe_folders: dict[str, Path]
) -> None:
    asked = FOUR | {"top_k": 3}
    model = shop.build(shop.recipe(TRAIN, model=str(moe_folders["phi"]), experts=asked))
    assert {layer.top_k for layer in converted_layers(model)} == {3}
    with pytest.raises(UserError, match="sends a token to 2 experts, and the stage asks for 3"):
        shop.build(shop.recipe(TRAIN, model=str(moe_folders["llama"]), experts=asked))
