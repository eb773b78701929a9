"""Steps of many configurations, measured on the card at hand and compared with their predictions, allocated to the byte.

``OOMPH_KEEP_ROWS=1`` appends what was measured to ``tests/measured/gpu/CARD.jsonl``. The same runner measures a few of the
configurations on the CPU, at a size that it takes seconds for, so that it is tested everywhere.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from oomph.core.forms import CachedForms, FormKey, Traced
from oomph.core.kept import Kept, read_rows
from oomph.core.measuring import Machine, Reading, measure
from oomph.live.hardware import cpu_machine, machine
from oomph.live.measure import measure_apart, measure_here
from oomph.live.source import make_form
from oomph.recipe import Recipe
from oomph.records import Measurement


class Scale(NamedTuple):
    """The size of the models that are put together here, and of a sample."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    tokens: int
    image: int


SCALES = {"cuda": Scale(1024, 6, 16, 32000, 1024, 336), "cpu": Scale(128, 3, 4, 1024, 256, 56)}


def sizes(scale: Scale, **more: Any) -> dict[str, Any]:
    """Settings that most configurations have under the same names."""
    common = {"hidden_size": scale.hidden, "num_hidden_layers": scale.layers, "num_attention_heads": scale.heads}
    wide = {"intermediate_size": 4 * scale.hidden, "vocab_size": scale.vocabulary, "max_position_embeddings": 4096}
    return {**common, **wide, **more}


MODELS: dict[str, Callable[[Scale], dict[str, Any]]] = {
    "llama": lambda s: sizes(s, model_type="llama", num_key_value_heads=s.heads // 2),
    "gpt-neox": lambda s: sizes(s, model_type="gpt_neox"),
    "qwen2": lambda s: sizes(s, model_type="qwen2", num_key_value_heads=s.heads // 2, tie_word_embeddings=True),
    "clip": lambda s: sizes(s, model_type="clip_vision_model", image_size=s.image, patch_size=14),
    "qwen3-moe": lambda s: sizes(
        s,
        model_type="qwen3_moe",
        num_key_value_heads=s.heads // 2,
        head_dim=s.hidden // s.heads,
        moe_intermediate_size=s.hidden,
        num_experts=8,
        num_experts_per_tok=2,
    ),
}
TEXT = {"language": 1e-4, "head": 1e-4}
EXPERTS = {**TEXT, "experts": 1e-4, "router": 1e-4}
VISION = {**TEXT, "vision": "frozen", "projector": 1e-3}
ADAPTERS = {"language": "frozen", "head": "frozen", "lora": 2e-4}
VISION_ADAPTERS = {**ADAPTERS, "vision": "frozen", "projector": 1e-3}
LORA = {"rank": 16}
UPCYCLED = {"experts": {"count": 4, "top_k": 2, "layers": "alternate"}}
PLAIN = {"checkpointing": "none", "vision_checkpointing": "none", "loss": "full", "precision": "bfloat16", "micro_batch": 2}


class Configuration(NamedTuple):
    """What is measured: a catalogued model or one of `MODELS`, or a tower and a language model; what trains; knobs.

    `exact` is whether allocated bytes have to be equal: where the layers of bitsandbytes are not involved.
    """

    model: str | tuple[str, str]
    train: dict[str, Any]
    memory: Mapping[str, Any] = MappingProxyType({})
    stage: Mapping[str, Any] = MappingProxyType({})
    exact: bool = True

    def recipe(self, name: str, folder: Path, scale: Scale) -> Recipe:
        """The recipe, its models' configurations in a folder."""

        def find(model: str) -> str:
            if model not in MODELS:
                return model
            (folder / model).mkdir(exist_ok=True)
            (folder / model / "config.json").write_text(json.dumps(MODELS[model](scale)))
            return str(folder / model)

        parts = {} if isinstance(self.model, str) else dict(zip(("vision", "language"), map(find, self.model), strict=True))
        return Recipe.model_validate(
            {
                "name": name,
                "model": find(self.model) if isinstance(self.model, str) else {**parts, "projector": "mlp2x_gelu"},
                "data": {"max_tokens": scale.tokens},
                "hardware": {"gpu": "A100-SXM4-40GB"},
                "memory": {**PLAIN, **self.memory},
                "stages": [{"name": "tune", "train": self.train, "effective_batch": 8, **self.stage}],
            }
        )


LLAVA = ("clip", "llama")
CONFIGURATIONS = {
    "llama": Configuration("llama", TEXT),
    "llama, ladder": Configuration("llama", TEXT, {"micro_batch": "auto"}),
    "llama, blocks": Configuration("llama", TEXT, {"checkpointing": "blocks"}),
    "llama, every-2": Configuration("llama", TEXT, {"checkpointing": "every-2"}),
    "llama, blocks-offload": Configuration("llama", TEXT, {"checkpointing": "blocks-offload"}),
    "llama, eager": Configuration("llama", TEXT, {"attention": "eager"}),
    "llama, eager-fp32": Configuration("llama", TEXT, {"attention": "eager-fp32"}),
    "llama, efficient": Configuration("llama", TEXT, {"attention": "efficient"}),
    "llama, flash": Configuration("llama", TEXT, {"attention": "flash"}),
    "llama, chunked": Configuration("llama", TEXT, {"loss": "chunked"}),
    "llama, full-shifted": Configuration("llama", TEXT, {"loss": "full-shifted"}),
    "llama, float32": Configuration("llama", TEXT, {"precision": "float32"}),
    "llama, bfloat16-mixed": Configuration("llama", TEXT, {"precision": "bfloat16-mixed"}),
    "llama, float16-mixed": Configuration("llama", TEXT, {"precision": "float16-mixed"}),
    "llama, foreach": Configuration("llama", TEXT, {"optimizer": "adamw-foreach"}),
    "llama, loop": Configuration("llama", TEXT, {"optimizer": "adamw-loop"}),
    "llama, master weights": Configuration("llama", TEXT, {"master_weights": True}),
    "llama, optimizer on the host": Configuration("llama", TEXT, {"optimizer_offload": True}),
    "llama, 8-bit optimizer": Configuration("llama", TEXT, {"optimizer": "adamw-8bit"}),
    "llama, expandable segments": Configuration("llama", TEXT, {"expandable_segments": True}),
    "llama, LoRA": Configuration("llama", ADAPTERS, {}, {"lora": LORA}),
    "llama, LoRA, eager, blocks": Configuration(
        "llama", ADAPTERS, {"attention": "eager", "checkpointing": "blocks"}, {"lora": LORA}
    ),
    "llama, nf4": Configuration(
        "llama", ADAPTERS, {"checkpointing": "blocks"}, {"lora": LORA, "quantization": {"kind": "nf4"}}, exact=False
    ),
    "gpt-neox": Configuration("gpt-neox", TEXT),
    "qwen2, LoRA, efficient": Configuration("qwen2", ADAPTERS, {"attention": "efficient"}, {"lora": LORA}),
    "llava": Configuration(LLAVA, VISION),
    "llava, all of it, blocks": Configuration(
        LLAVA, {**VISION, "vision": 1e-5}, {"checkpointing": "blocks", "vision_checkpointing": "blocks"}
    ),
    "llava, LoRA, ladder": Configuration(LLAVA, VISION_ADAPTERS, {"micro_batch": "auto"}, {"lora": LORA}),
    "llava, upcycled": Configuration(LLAVA, {**VISION, "experts": 1e-4, "router": 1e-4}, {}, UPCYCLED),
    "upcycled": Configuration("llama", EXPERTS, {}, UPCYCLED),
    "upcycled, blocks": Configuration("llama", EXPERTS, {"checkpointing": "blocks"}, UPCYCLED),
    "qwen3-moe": Configuration("qwen3-moe", EXPERTS),
    "qwen3-moe, LoRA, blocks": Configuration(
        "qwen3-moe", {**ADAPTERS, "experts": "frozen", "router": "frozen"}, {"checkpointing": "blocks"}, {"lora": LORA}
    ),
    "PaddleOCR-VL": Configuration("paddleocr-vl-1.5", VISION, {"checkpointing": "blocks"}),
    "StableLM 2": Configuration("stablelm-2-1_6b", TEXT, {"checkpointing": "blocks", "loss": "chunked"}),
}
ON_THE_CPU = {
    "llama": {"precision": "float32", "micro_batch": 1},
    "llava, all of it, blocks": {"precision": "float32", "micro_batch": 1},
    "llama, LoRA": {"micro_batch": 1},
    "upcycled": {"micro_batch": 1},
}
GENERATOR_BYTES = 5056
"""State of the random generator, which each checkpointed block keeps and no operator makes."""
NUMBERS_BYTES = 512
"""What numbers that become tensors on the CPU take together."""


def make_forms(keys: Sequence[FormKey], done: Callable[[FormKey, Traced], None]) -> None:
    """Makes forms in this process."""
    for key in keys:
        done(key, make_form(key))


@pytest.fixture(scope="module")
def forms() -> CachedForms:
    """A source of closed forms."""
    return CachedForms(make_forms)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors on few cores: more threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def card() -> Machine:
    """The card at hand."""
    return machine()


def keep(root: Path, recipe: Recipe, measured: Measurement) -> None:
    """Appends rows to the card's file where that is asked for."""
    if os.environ.get("OOMPH_KEEP_ROWS") != "1":
        return
    folder = root / "tests" / "measured" / "gpu"
    folder.mkdir(exist_ok=True)
    kept = Kept(recipe, folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', measured.gpu)}.jsonl")
    kept.keep(measured)
    assert not kept.lost


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_measured_step_is_predicted(name: str, tmp_path: Path, root: Path, forms: CachedForms) -> None:
    configuration = CONFIGURATIONS[name]
    recipe = configuration.recipe(name, tmp_path, SCALES["cuda"])
    if card().capability < (8, 0) and (recipe.memory.precision.startswith("bfloat16") or recipe.memory.attention == "flash"):
        pytest.skip("bfloat16 and flash attention need compute capability 8.0")
    measured = measure(recipe, forms, card(), measure_apart)
    keep(root, recipe, measured)
    (stage,) = measured.stages
    assert stage.rungs, stage.stopped
    for rung in stage.rungs:
        assert rung.measured is not None, rung.failure
        difference = rung.predicted.allocated_peak_bytes - rung.measured.allocated_peak_bytes
        assert difference == 0 or (not configuration.exact and rung.within)
        assert rung.within


def test_there_are_enough_configurations_of_every_kind() -> None:
    kinds = {"llama": 10, "LoRA": 4, "llava": 4, "moe": 2, "upcycled": 2, "eager": 2, "blocks": 5, "ladder": 2}
    assert len(CONFIGURATIONS) >= 20
    for kind, least in kinds.items():
        assert sum(kind in name for name in CONFIGURATIONS) >= least, kind


@pytest.mark.parametrize("name", ON_THE_CPU)
@pytest.mark.usefixtures("one_thread")
def test_the_runner_measures_on_the_cpu(name: str, tmp_path: Path, forms: CachedForms) -> None:
    configuration = CONFIGURATIONS[name]
    settled = configuration._replace(memory={**configuration.memory, **ON_THE_CPU[name]})
    measured = measure(settled.recipe(name, tmp_path, SCALES["cpu"]), forms, cpu_machine(), measure_here)
    ((rung,),) = [stage.rungs for stage in measured.stages]
    assert rung.measured is not None, rung.failure
    assert measured.within
    predicted = {peak.phase: peak.allocated_peak_bytes for peak in rung.predicted.phases}
    found = {peak.phase: peak.allocated_peak_bytes for peak in rung.measured.phases}
    assert predicted["load"] == found["load"]
    assert predicted.keys() == found.keys()
    blocks = 2 * SCALES["cpu"].layers
    for phase, nbytes in found.items():
        assert abs(nbytes - predicted[phase]) <= blocks * GENERATOR_BYTES + NUMBERS_BYTES, phase
    assert rung.step_seconds is not None
    assert rung.utilisation is not None
    assert rung.process_peak_bytes > found["backward"]  # type: ignore[operator]


@pytest.mark.usefixtures("one_thread")
def test_a_prediction_that_is_wrong_is_found(tmp_path: Path, forms: CachedForms) -> None:
    configuration = CONFIGURATIONS["llama"]._replace(memory={"precision": "float32", "micro_batch": 1})
    recipe = configuration.recipe("llama", tmp_path, SCALES["cpu"])

    def heavier(job: Any) -> Reading:
        reading = measure_here(job._replace(shape=job.shape._replace(tokens=job.shape.tokens + 64)))
        assert reading.measured is not None
        return reading

    measured = measure(recipe, forms, cpu_machine(), heavier)
    assert not measured.within


def test_kept_rows_are_read_again(tmp_path: Path, root: Path) -> None:
    for file in sorted((root / "tests" / "measured" / "gpu").glob("*.jsonl")):
        assert all(row.measurement.device == "cuda" for row in read_rows(file))
