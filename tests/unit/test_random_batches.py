"""A batch of random values trains a real model of every kind that sees images, and what it trains has finite values.

The catalogued configurations with small layers, random weights as `oomph.live.measure` makes them, on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from oomph.core.catalogue import model_folder
from oomph.core.forms import FormKey
from oomph.core.layout import Shape
from oomph.live.batch import images_of, random_batch, text_inputs
from oomph.live.measure import materialise
from oomph.live.model import build
from oomph.live.source import build_model, read_model_config
from oomph.live.step import LOSSES, train_step

SMALLER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_heads": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "depth": 2,
    "out_hidden_size": 64,
    "mrope_section": [2, 3, 3],
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mm_tokens_per_image": 4,
    "image_size": 112,
    "scale_factor": 2,
}
IMAGE = (112, 112)


KINDS = (
    "gemma-3-12b-it",
    "internvl3-8b-hf",
    "llava-1.5-7b-hf",
    "paddleocr-vl-1.5",
    "qwen2.5-vl-7b-instruct",
    "qwen3-vl-30b-a3b-instruct",
    "smolvlm-instruct",
)


def shrunk(value: Any) -> Any:
    """A configuration with small sizes in place of its own."""
    if not isinstance(value, dict):
        return value
    return {
        name: ([SMALLER[name]] * 2 if isinstance(old, list) and not isinstance(SMALLER[name], list) else SMALLER[name])
        if name in SMALLER
        else shrunk(old)
        for name, old in value.items()
    }


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> PretrainedConfig:
    content = json.loads((model_folder(request.param) / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(shrunk(content)))
    read: PretrainedConfig = AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    return read


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_random_batch_trains_a_model_that_sees_images(config: PretrainedConfig) -> None:
    images = images_of(config, IMAGE)
    assert images is not None
    shape = Shape(2, images.tokens + 12, 2)
    model = build(config, torch.float32, "sdpa")
    materialise(model, torch.device("cpu"))
    batch = random_batch(model.config, shape, images, torch.float32)
    plain = text_inputs(model.config, shape, None) | images.inputs(shape.images, torch.float32)
    assert [(name, value.shape, value.dtype) for name, value in batch.items()] == [
        (name, value.shape, value.dtype) for name, value in plain.items()
    ]
    token = getattr(config, "image_token_id", None) or config.image_token_index
    assert (batch["input_ids"] == token).sum(dim=1).tolist() == [images.tokens] * 2
    assert not (batch["labels"] == token).any()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        loss = train_step(model, optimizer, [lambda: dict(batch)], LOSSES["full"], shape.samples * shape.tokens)
        assert loss.isfinite()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_tied_weights_stay_tied_and_buffers_have_values(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True, **sizes}))
    model = build(AutoConfig.from_pretrained(tmp_path, local_files_only=True), torch.bfloat16, "sdpa")
    materialise(model, torch.device("cpu"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert all((buffer == 1).all() for _, buffer in model.named_buffers())


@pytest.mark.parametrize("section", ['{"kind": "nf4"}', '{"kind": "nf4", "double_quantization": true}', '{"kind": "int8"}'])
def test_quantized_weights_are_made_up_by_bitsandbytes_itself(tmp_path: Path, plain_key: FormKey, section: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    adapters = {"lora": '{"rank": 4}', "trained": ("lora",), "frozen": ("language", "head")}
    key = replace(plain_key, model=str(tmp_path), quantization=section, capability=(), **adapters)
    model = build_model(key, read_model_config(key))
    materialise(model, torch.device("cpu"))
    kinds = {type(parameter).__name__ for parameter in model.parameters()} - {"Parameter"}
    assert kinds == ({"Int8Params"} if "int8" in section else {"Params4bit"})
    ids = torch.randint(50, (2, 16))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    assert train_step(model, optimizer, [lambda: {"input_ids": ids, "labels": ids}], LOSSES["full"], 32).isfinite()
