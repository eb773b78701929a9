"""Where the weights of a stage come from: new ones, the parts' own, those of the stage before; with adapters, quantized."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PhiConfig, PhiForCausalLM

from oomph.errors import UserError
from oomph.live.export import save_model
from oomph.live.weights import parameter_groups, trained_parts

ALL = {"vision": 1e-5, "projector": 1e-3, "language": 2e-5, "head": 2e-5}
FROZEN = {"vision": "frozen", "language": "frozen", "head": "frozen"}
ALIGN = {**FROZEN, "projector": 1e-3}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_parts_bring_their_own_weights(shop: Any, logits: Callable[..., torch.Tensor]) -> None:
    model = shop.build(shop.recipe(ALIGN))
    assert same(model.model.vision_tower.state_dict(), shop.tower.state_dict())
    assert same(model.model.language_model.state_dict(), shop.language.model.state_dict())
    assert torch.equal(model.lm_head.weight, shop.language.lm_head.weight)
    torch.testing.assert_close(logits(model), logits(shop.language))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"model.multi_modal_projector.linear_{number}.{leaf}" for number in (1, 2) for leaf in ("weight", "bias")
    }
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_a_tower_comes_out_of_its_whole_clip(shop: Any) -> None:
    tower = shop.save_whole_clip("clip")
    assert same(shop.build(shop.recipe(ALIGN, vision="clip")).model.vision_tower.state_dict(), tower.state_dict())


def test_new_weights_are_those_of_transformers_and_of_the_seed(shop: Any) -> None:
    recipe = shop.recipe(ALL, weights="random")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = (shop.build(recipe, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(first.state_dict(), again.state_dict())
    assert not same(first.state_dict(), other.state_dict())
    for name, parameter in first.named_parameters():
        if "language_model.layers" in name and parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
        elif name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    assert first.model.multi_modal_projector.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.2)
    frequencies = first.model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 10000.0 ** (-torch.arange(0, 24, 2) / 24))
    assert first.generation_config.eos_token_id == 1


def test_new_weights_do_not_depend_on_the_precision(shop: Any) -> None:
    recipe = shop.recipe(ALL, weights="random")
    full, half = shop.build(recipe), shop.build(recipe, precision="bfloat16")
    for ours, theirs in zip(full.parameters(), half.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu", "pool_mlp2x_gelu"])
def test_stage_two_starts_with_the_bits_of_stage_one(
    shop: Any, encoder_of: Any, kind: str, tmp_path: Path, logits: Callable[..., torch.Tensor]
) -> None:
    recipe = shop.recipe(ALIGN, projector=kind)
    model = shop.build(recipe, precision="bfloat16-mixed")
    for parameter in model.parameters():
        parameter.data += 2**-20 * torch.randn_like(parameter) if parameter.requires_grad else 0
    save_model(model, tmp_path / "model", recipe, encoder_of(recipe))
    both = shop.recipe({**ALIGN, "language": 1e-5}, projector=kind)
    following = shop.build(both, tmp_path / "model", precision="bfloat16-mixed")
    ours, theirs = model.state_dict(), following.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].to(theirs[name].dtype), theirs[name]) for name in ours)
    projector = [parameter.dtype for name, parameter in following.named_parameters() if "projector" in name]
    assert set(projector) == {torch.float32}
    frozen = shop.build(shop.recipe({**ALL, "projector": "frozen"}, projector=kind), tmp_path / "model", precision="float32")
    assert torch.equal(logits(frozen, frozen.config.image_token_id), logits(model.float(), model.config.image_token_id))


def test_tied_embeddings_stay_tied(shop: Any, encoder_of: Any, tmp_path: Path) -> None:
    shop.save_language("tied", tie_word_embeddings=True)
    recipe = shop.recipe({"language": 1e-4}, model=str(shop.folder / "tied"))
    model = shop.build(recipe)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_model(model, tmp_path / "model", recipe, encoder_of(recipe))
    following = shop.build(recipe, tmp_path / "model")
    assert following.lm_head.weight is following.model.embed_tokens.weight
    assert same(model.state_dict(), following.state_dict())
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_adapters_start_as_peft_starts_them(shop: Any, logits: Callable[..., torch.Tensor]) -> None:
    lora = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    recipe = shop.recipe({"language": "frozen", "head": "frozen", "lora": 1e-4}, model=str(shop.folder / "language"), lora=lora)
    model, again = shop.build(recipe, precision="bfloat16"), shop.build(recipe, precision="bfloat16")
    adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    assert len(adapters) == 8
    for name, parameter in adapters.items():
        assert parameter.dtype == torch.float32
        if "lora_B" in name:
            assert not parameter.any()
        else:
            bound = 1 / parameter.shape[1] ** 0.5
            assert 0.9 * bound < parameter.abs().max().item() <= bound
    assert same(model.state_dict(), again.state_dict())
    plain = shop.build(shop.recipe({"language": 1e-4, "head": 1e-4}, model=str(shop.folder / "language")), precision="bfloat16")
    torch.testing.assert_close(logits(model), logits(plain))


@pytest.mark.parametrize(("kind", "off"), [("nf4", 0.25), ("int8", 0.02)])
def test_quantized_stages_train_where_bitsandbytes_can(
    shop: Any, kind: str, off: float, logits: Callable[..., torch.Tensor]
) -> None:
    train = {"language": "frozen", "head": "frozen", "lora": 1e-2}
    sections = {"lora": {"rank": 4}, "quantization": {"kind": kind, "upcast": False}}
    recipe = shop.recipe(train, model=str(shop.folder / "language"), **sections)
    model = shop.build(recipe)
    layer = model.model.layers[0].self_attn.q_proj.base_layer
    assert layer.weight.dtype == (torch.uint8 if kind == "nf4" else torch.int8)
    assert layer.weight.nbytes == 48 * 48 // (2 if kind == "nf4" else 1)
    expected = logits(shop.language)
    assert 0 < (logits(model) - expected).abs().max() < off * expected.abs().max()
    ids = torch.arange(20).view(1, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_a_head_with_a_bias_is_not_left_out_in_silence(shop: Any) -> None:
    config = PhiConfig(vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    PhiForCausalLM(config).save_pretrained(shop.folder / "phi")
    shutil.copyfile(shop.folder / "language" / "tokenizer.json", shop.folder / "phi" / "tokenizer.json")
    shutil.copyfile(shop.folder / "language" / "tokenizer_config.json", shop.folder / "phi" / "tokenizer_config.json")
    said: list[str] = []
    shop.build(shop.recipe(ALIGN, language="phi"), notify=said.append)
    assert [sentence for sentence in said if "has a bias" in sentence]


def test_what_is_wrong_is_said_of_all_parts_at_once(shop: Any, tmp_path: Path) -> None:
    shutil.copytree(shop.folder / "tower", tmp_path / "tower")
    shutil.copytree(shop.folder / "language", tmp_path / "language")
    tower, language = tmp_path / "tower" / "model.safetensors", tmp_path / "language" / "model.safetensors"
    tensors = load_file(language)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(47)
    save_file(tensors, language, metadata={"format": "pt"})
    tower.write_bytes(tower.read_bytes()[:-100])
    paths = {"vision": tmp_path / "tower", "language": tmp_path / "language"}
    with pytest.raises(UserError) as caught:
        shop.build(shop.recipe(ALIGN, **paths))
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "cannot be read as safetensors" in problems
    assert "lacks 1 weights of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight" in problems
    assert "the weight model.norm.weight is [47], and the model's is [48]" in problems


def test_pickles_are_never_read(shop: Any, tmp_path: Path) -> None:
    shutil.copytree(shop.folder / "language", tmp_path / "language")
    (tmp_path / "language" / "model.safetensors").unlink()
    recipe = shop.recipe({"language": 1e-4, "head": 1e-4}, model=str(tmp_path / "language"))
    with pytest.raises(UserError, match=r"holds no weights: there is no model\.safetensors"):
        shop.build(recipe)
    torch.save(shop.language.state_dict(), tmp_path / "language" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds weights as pickles alone \(pytorch_model\.bin\), which run code"):
        shop.build(recipe)


def test_a_folder_of_another_model_is_refused(shop: Any, tmp_path: Path, encoder_of: Any) -> None:
    recipe = shop.recipe({"language": 1e-4, "head": 1e-4}, model=str(shop.folder / "language"))
    shop.save_language("narrow", hidden_size=32)
    with pytest.raises(UserError, match=r"the weight lm_head\.weight is \[320, 32\], and the model's is \[320, 48\]"):
        shop.build(recipe, shop.folder / "narrow")


def test_groups_hold_what_trains_once_and_with_its_rate(shop: Any) -> None:
    train = {"vision": "frozen", "projector": 1e-3, "language:*mlp*": 3e-5, "language:!*mlp*": 2e-5, "head": "frozen"}
    recipe = shop.recipe(train, weight_decay=0.1)
    model = shop.build(recipe)
    groups = parameter_groups(model, recipe.stages[0])
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == (1e-3 if "projector" in name else 3e-5 if "mlp" in name else 2e-5)
            assert group["weight_decay"] == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name
    plain = parameter_groups(model, shop.recipe(train).stages[0])
    assert [(group["name"], group["weight_decay"]) for group in plain] == [
        ("projector", 0.0),
        ("language:*mlp*", 0.0),
        ("language:!*mlp*", 0.0),
    ]
    parts = trained_parts(model, recipe.stages[0])
    assert [(item.part, item.pattern, item.rate, item.tensors) for item in parts] == [
        ("projector", "projector", 1e-3, 4),
        ("language", "language:*mlp*", 3e-5, 6),
        ("language", "language:!*mlp*", 2e-5, 14),
    ]
    assert parts[0].parameters == 32 * 48 + 48 + 48 * 48 + 48
    assert sum(item.parameters for item in parts) == sum(p.numel() for p in model.parameters() if p.requires_grad)
