"""MoE-LLaVA's checkpoints, made small with exactly their names and shapes."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration, PhiConfig, SiglipVisionConfig, SiglipVisionModel

from oomph.errors import UserError
from oomph.live.batch import images_of
from oomph.live.generate import open_answerer
from oomph.live.model import compose_llava, read_config
from oomph.live.moe import converted_layers
from oomph.live.published import convert, read_published, write_back
from oomph.live.weights import reader_of

HIDDEN, INNER, VOCAB, LAYERS, VISION = 48, 64, 320, 4, 32
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}
EYES = {"mm_hidden_size": VISION, "image_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
EYES |= {"mm_vision_select_feature": "patch", "mm_video_tower": None, "use_mm_proj": True, "torch_dtype": "bfloat16"}
PHI = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
PHI |= {"qk_layernorm": False}
STABLELM = {"hidden_act": "silu", "norm_eps": 1e-5, "rope_pct": 0.25, "rope_theta": 10000, "use_qkv_bias": True}
MISTRAL = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": None}
OTHERS = {"phi": PHI, "stablelm": STABLELM, "mistral": MISTRAL, "llama": MISTRAL, "qwen1_5": MISTRAL}
WITH_BIASES = {"phi": ("q_proj", "k_proj", "v_proj", "dense"), "stablelm": ("q_proj", "k_proj", "v_proj")}
WITH_BIASES |= {"qwen1_5": WITH_BIASES["stablelm"]}
PLAIN, GATED = ("fc1", "fc2"), ("gate_proj", "up_proj", "down_proj")
SIGLIP = SiglipVisionConfig(
    hidden_size=VISION, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)


def experts_of(layers: list[int], residual: bool = False) -> dict[str, Any]:
    """The section ``moe`` of a configuration, as initialize_moe_modules leaves it."""
    return {
        "moe_enable": True,
        "moe_mode": "sparse",
        "moe_layers_idx": layers,
        "num_experts": [4] * len(layers),
        "ep_size": 1,
        "top_k_experts": 2,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 2.0,
        "min_capacity": 0,
        "use_residual": residual,
        "router_aux_loss_coef": 0.01,
        "train_modules": ["fc1", "fc2", "wg"],
    }


class Names:
    """The names and shapes of a checkpoint of MoE-LLaVA."""

    def __init__(self, kind: str, moe: dict[str, Any] | None, tower: Any) -> None:
        self.kind, self.moe, self.tower = kind, moe, tower

    def all(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
        for number in range(LAYERS):
            found |= {f"model.layers.{number}.{name}": shape for name, shape in self._layer(number).items()}
        last = "final_layernorm" if self.kind == "phi" else "norm"
        found |= self._norm(f"model.{last}")
        for position, inputs in ((0, VISION), (2, HIDDEN)):
            name = f"model.mm_projector.image_spatial_proj.{position}"
            found |= {f"{name}.weight": (HIDDEN, inputs), f"{name}.bias": (HIDDEN,)}
        if self.tower is not None:
            for name, tensor in self.tower.state_dict().items():
                found[f"model.image_tower.image_tower.vision_model.{name}"] = tuple(tensor.shape)
        return found

    def _norm(self, name: str) -> dict[str, tuple[int, ...]]:
        biased = self.kind in ("phi", "stablelm")
        return {f"{name}.weight": (HIDDEN,)} | ({f"{name}.bias": (HIDDEN,)} if biased else {})

    def _layer(self, number: int) -> dict[str, tuple[int, ...]]:
        out = "dense" if self.kind == "phi" else "o_proj"
        found = self._norm("input_layernorm")
        if self.kind != "phi":
            found |= self._norm("post_attention_layernorm")
        for name in ("q_proj", "k_proj", "v_proj", out):
            found[f"self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
            if name in WITH_BIASES.get(self.kind, ()):
                found[f"self_attn.{name}.bias"] = (HIDDEN,)
        if self.moe is None or number not in self.moe["moe_layers_idx"]:
            return found | self._ffn("mlp.")
        found["mlp.deepspeed_moe.gate.wg.weight"] = (4, HIDDEN)
        for expert in range(4):
            found |= self._ffn(f"mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.")
        if self.moe["use_residual"]:
            found |= self._ffn("mlp.mlp.") | {"mlp.coefficient.weight": (2, HIDDEN), "mlp.coefficient.bias": (2,)}
        return found

    def _ffn(self, prefix: str) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name in PLAIN if self.kind == "phi" else GATED:
            shape = (HIDDEN, INNER) if name in ("fc2", "down_proj") else (INNER, HIDDEN)
            found[f"{prefix}{name}.weight"] = shape
            if self.kind == "phi":
                found[f"{prefix}{name}.bias"] = shape[:1]
        return found


class Checkpoints:
    """Makes published checkpoints."""

    def __init__(self, shop: Any, root: Path, make_tokenizer: Callable[..., Any]) -> None:
        self._shop, self._root, self._tokenizer, self._made = shop, root, make_tokenizer, 0
        self.siglip = root / "siglip"
        SiglipVisionModel(SIGLIP).save_pretrained(self.siglip)

    def make(
        self,
        kind: str = "phi",
        moe: dict[str, Any] | None = None,
        file: str = "bin",
        tower: Any = None,
        inside: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """A folder with random weights, gates in float32, all else in bfloat16; and with a configuration that differs."""
        self._made += 1
        folder = self._root / f"published{self._made}"
        folder.mkdir()
        model_type = f"{'moe_' if moe else ''}llava_{kind}"
        place = self._shop.folder / "tower" if tower is None else self.siglip
        content = SIZES | EYES | OTHERS[kind] | {"model_type": model_type, "mm_image_tower": str(place)}
        content |= {"architectures": [f"{'MoE' if moe else ''}LLaVA{kind.title()}ForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(content | ({"moe": moe} if moe else {}) | dict(config or {})))
        vision = (tower or self._shop.tower) if inside else None
        generator = torch.Generator().manual_seed(self._made)
        tensors: dict[str, Tensor] = {}
        for name, shape in Names(kind, moe, vision).all().items():
            made = 0.1 * torch.randn(shape, generator=generator) + ("norm.weight" in name)
            tensors[name] = made if name.endswith("wg.weight") else made.bfloat16()
        self._write(folder, tensors, file)
        tokenizer = self._tokenizer()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        return folder

    @staticmethod
    def _write(folder: Path, tensors: dict[str, Tensor], file: str) -> None:
        names = sorted(tensors)
        for number, half in enumerate((names[::2], names[1::2])):
            part = {name: tensors[name] for name in half}
            if file == "bin":
                torch.save(part, folder / f"pytorch_model-{number + 1:05}-of-00002.bin")
            else:
                save_file(part, folder / f"model-{number + 1:05}-of-00002.safetensors")


@pytest.fixture(scope="module")
def checkpoints(shop: Any, tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Any) -> Checkpoints:
    """A maker of checkpoints."""
    return Checkpoints(shop, tmp_path_factory.mktemp("published"), make_tokenizer)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    for path in folder.glob("*.bin"):
        found |= torch.load(path, weights_only=True)
    return found


CASES = [
    ("phi", None, "bin"),
    ("phi", experts_of([0, 2]), "bin"),
    ("phi", experts_of([0, 2], residual=True), "safetensors"),
    ("stablelm", experts_of([0, 2]), "safetensors"),
    ("mistral", experts_of([0, 2]), "bin"),
    ("mistral", experts_of([0, 1, 2, 3]), "bin"),
    ("stablelm", None, "bin"),
    ("llama", experts_of([1]), "safetensors"),
    ("qwen1_5", experts_of([0, 2]), "bin"),
]


@pytest.mark.parametrize(("kind", "moe", "file"), CASES)
def test_a_checkpoint_is_read_and_written_back_bit_for_bit(
    checkpoints: Checkpoints, kind: str, moe: Any, file: str, tmp_path: Path
) -> None:
    folder = checkpoints.make(kind, moe, file)
    notes: list[str] = []
    convert(folder, tmp_path / "ours", notify=notes.append)
    assert not [note for note in notes if "no place" in note]
    write_back(tmp_path / "ours", folder, tmp_path / "theirs")
    before, after = tensors_in(folder), tensors_in(tmp_path / "theirs")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(after[name], tensor), name
    assert (tmp_path / "theirs" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (tmp_path / "theirs" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_dense_checkpoint_and_one_with_experts_compute_the_same_where_experts_are_equal(
    checkpoints: Checkpoints, tmp_path: Path, logits: Any
) -> None:
    dense = checkpoints.make("phi", None, "safetensors")
    moe = checkpoints.make("phi", experts_of([0, 2]), "safetensors")
    given, found = tensors_in(dense), tensors_in(moe)
    for name in found:
        if "wg.weight" not in name:
            found[name] = given[re.sub(r"deepspeed_moe\.experts\.deepspeed_experts\.\d+\.", "", name)]
    for path in moe.glob("*.safetensors"):
        save_file({name: found[name].clone() for name in load_file(path)}, path)
    for name, folder in (("dense", dense), ("moe", moe)):
        convert(folder, tmp_path / name)
    models = [reader_of(read_config(tmp_path / n)).from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("dense", "moe")]
    image_token = models[0].config.image_token_id
    torch.testing.assert_close(logits(models[1], image_token), logits(models[0], image_token), rtol=0, atol=1e-5)


def test_a_converted_checkpoint_is_trained_on_and_answers(
    checkpoints: Checkpoints, shop: Any, tmp_path: Path
) -> None:
    convert(checkpoints.make("phi", experts_of([0, 2])), tmp_path / "ours")
    train = {"vision": "frozen", "projector": 1e-4, "language": "frozen", "head": "frozen", "experts": 1e-4, "router": 1e-4}
    model = shop.build(shop.recipe(train, model=str(tmp_path / "ours")), precision="bfloat16")
    assert [layer.number for layer in converted_layers(model)] == [0, 2]
    answerer = open_answerer(str(tmp_path / "ours"), 1, lambda sentence: None)
    assert answerer.encoder.tokenizer.chat_template


def test_siglip_loses_its_first_patch_as_published(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints.make("phi", experts_of([0, 2]), tower=SiglipVisionModel(SIGLIP))
    config = read_published(folder).config
    patches = (SIGLIP.image_size // SIGLIP.patch_size) ** 2
    images = images_of(config, None)
    assert images is not None
    assert images.tokens == patches - 1
    convert(folder, tmp_path / "ours")
    answerer = open_answerer(str(tmp_path / "ours"), 1, lambda sentence: None)
    assert answerer.encoder.vision is not None
    assert answerer.encoder.vision.cost((32, 32)).tokens == patches - 1
    with torch.no_grad():
        found = answerer._model.get_image_features(torch.randn(1, 3, 32, 32))
    features = found.pooler_output if hasattr(found, "pooler_output") else found
    assert features[0].shape[-2] == patches - 1


@pytest.mark.parametrize(
    ("select", "clip", "siglip"), [("patch", 16, 16), ("full", 17, 16), ("drop-first", 16, 15)], ids=["patch", "full", "drop"]
)
def test_what_a_recipe_selects_of_towers_with_and_without_class_token(select: str, clip: int, siglip: int) -> None:
    sizes = {"hidden_size": VISION, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for tower, tokens in ((CLIPVisionConfig(**sizes, image_size=32, patch_size=8), clip), (SIGLIP, siglip)):
        config = compose_llava(tower, PhiConfig(**SIZES), -2, select)
        images = images_of(config, None)
        assert images is not None
        assert images.tokens == tokens
        with torch.no_grad():
            found = LlavaForConditionalGeneration(config).get_image_features(torch.randn(1, 3, 32, 32))
        assert found.pooler_output[0].shape[-2] == tokens
        if tokens != 16:
            with pytest.raises(UserError, match="no place in the grid" if tokens == 17 else "not a square"):
                compose_llava(tower, PhiConfig(**SIZES), -2, select, "pool_linear")


def test_a_tower_that_the_checkpoint_lacks_comes_from_its_folder(
    checkpoints: Checkpoints, shop: Any, tmp_path: Path
) -> None:
    elsewhere = {"mm_image_tower": "openai/clip-vit-large-patch14-336"}
    folder = checkpoints.make("phi", experts_of([0, 2]), inside=False, config=elsewhere)
    convert(folder, tmp_path / "ours", tower=str(shop.folder / "tower"))
    found = tensors_in(tmp_path / "ours")["model.vision_tower.embeddings.class_embedding"]
    assert torch.equal(found, shop.tower.state_dict()["embeddings.class_embedding"].bfloat16())
    assert type(read_published(folder).config.vision_config) is CLIPVisionConfig


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "moe_llava_qwen"}, "transformers has no architecture for"),
        ({"image_projector_type": "qformer4_36"}, "projector of kind qformer4_36"),
        ({"mm_video_tower": "LanguageBind_Video"}, "video tower"),
        ({"moe": {"moe_enable": True}}, "does not say which layers have experts"),
        ({"moe": experts_of([0, 2]) | {"num_experts": [4, 4, 4]}}, "lists 3 numbers of experts"),
        ({"moe": experts_of([0, 9])}, "layer 9 does not exist"),
        ({"moe": experts_of([0, 2]) | {"top_k_experts": 5}}, "sends a token to 5 experts of 4"),
        ({"moe": experts_of([0, 2]) | {"num_experts": [3, 3]}}, r"is \[4, 64, 48\], and the model's is \[3, 64, 48\]"),
        ({"moe": experts_of([0, 1])}, "lacks"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    folder = checkpoints.make("phi", experts_of([0, 2]), config=change)
    with pytest.raises(UserError, match=problem):
        convert(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Danger:
    """Runs code when it is read from a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of a checkpoint ran",)


def test_a_pickle_runs_no_code(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints.make("phi", experts_of([0, 2]))
    torch.save({"lm_head.weight": Danger()}, folder / "pytorch_model-00003-of-00003.bin")
    with pytest.raises(UserError, match=r"more than tensors|tensors alone"):
        convert(folder, tmp_path / "ours")
    (folder / "pytorch_model-00003-of-00003.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"more than tensors|tensors alone"):
        convert(folder, tmp_path / "ours")


def test_write_back_wants_the_checkpoint_that_it_was(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder, other = checkpoints.make("phi", experts_of([0, 2])), checkpoints.make("phi", experts_of([0]))
    convert(folder, tmp_path / "ours")
    with pytest.raises(UserError, match="is of another model than"):
        write_back(tmp_path / "ours", other, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    for write in (lambda: convert(folder, tmp_path / "ours"), lambda: write_back(tmp_path / "ours", folder, tmp_path / "ours")):
        with pytest.raises(UserError, match="is not an empty folder"):
            write()
