"""LoRA steps that somebody measured on a Tesla T4, predicted to the byte.

The rows and what was run are in t4_lora_sweep.json (provenance inside): fp16 models from transformers 5.17 with LoRA adapters
in fp32, blocks checkpointed, AdamW, torch 2.14. Rows with quantised weights are left out, and repeated ones are taken once.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from oomph.core.allocator import Allocator, Replay, replay
from oomph.core.closed_form import constant_form
from oomph.core.layout import Shape, compose
from oomph.core.unroll import UNITS
from oomph.live import simulate
from oomph.live.cuda_rules import CudaRules, Device
from oomph.live.simulate import Setup, Simulator
from oomph.live.step import Batch, commit

MIB = 1024**2
ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "t4_lora_sweep.json").read_text())["rows"]
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "tie_word_embeddings": "tie_word_embeddings",
}
RESERVED_WITHIN = 0.01
"""Reserved bytes depend on the order in which weights were loaded, which for these rows is not known exactly."""


def name(row: dict[str, Any]) -> str:
    run = row["run"]
    return f"{row['model'].split('/')[1]}-{run['attn_impl']}-{run['batch_size']}x{run['seq_len']}"


UNQUANTISED = {name(row): row for row in ROWS if row["run"]["quantization"] == "none"}
QUICK = {"TinyLlama-1.1B-Chat-v1.0-eager-2x512", "TinyLlama-1.1B-Chat-v1.0-sdpa-2x1024"}


def config_of(row: dict[str, Any]) -> PretrainedConfig:
    known = row["model_config"]
    sizes = {ours: known[theirs] for theirs, ours in SIZES.items()} | {"max_position_embeddings": 32768}
    if row["model"].startswith("Qwen"):
        return Qwen2Config(**sizes)
    if row["model"].startswith("mistral"):
        return MistralConfig(sliding_window=None, head_dim=known["head_dim"], **sizes)
    return LlamaConfig(head_dim=known["head_dim"], **sizes)


def adapted(row: dict[str, Any]) -> PreTrainedModel:
    """The model with its adapters, on the meta device; adapters in fp32, as PEFT casts them."""
    run = row["run"]
    with torch.device("meta"):
        config = config_of(row)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16, attn_implementation=run["attn_impl"])
    model.tie_weights()
    model.config.use_cache = False
    model.requires_grad_(False)
    rank = run["lora_rank"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=run["lora_targets"])
    wrapped = get_peft_model(model, lora, low_cpu_mem_usage=True)
    for module in wrapped.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.requires_grad:
                module._parameters[key] = nn.Parameter(parameter.detach().float())
    wrapped.train()
    base: PreTrainedModel = wrapped.base_model.model
    return base


class MeasuredStep:
    """The step that was measured: mean loss of labels that are the ids, outputs alive until the optimizer, no clipping."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def loss(self, model: PreTrainedModel, batch: Batch, _: int) -> torch.Tensor:
        outputs = model(input_ids=batch["input_ids"], labels=batch["input_ids"])
        self._held = [batch, outputs]
        loss: torch.Tensor = outputs.loss
        return loss

    def run(self, model: Any, optimizer: Any, batches: Any, loss: Any, num_tokens: int, on: Callable[[str, int], None]) -> None:
        for index, collate in enumerate(batches):
            on("forward", index)
            value = loss(model, collate(), num_tokens)
            on("backward", index)
            value.backward()
            del value
            self._held = []
        on("optimizer", len(batches))
        self.commit(optimizer)

    @staticmethod
    def commit(optimizer: torch.optim.Optimizer) -> None:
        commit(optimizer, None)


class T4Rules(CudaRules):
    """The measuring script pinned memory-efficient attention; torch 2.14 of these rows kept cuBLASLt's workspace apart."""

    def __init__(self, _: Device, attention: Any) -> None:
        device = Device((7, 5), multiprocessors=40, unified_workspaces=False)
        super().__init__(device, "efficient" if attention == "sdpa" else attention)


@functools.cache
def predicted(key: str) -> Replay:
    """The replay of a row's warm-up and measured step, the layers in between unrolled."""
    row, step = UNQUANTISED[key], MeasuredStep()
    run = row["run"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it
        patch.setattr(simulate, "CudaRules", T4Rules)
        patch.setattr(simulate, "LOSSES", {"full": step.loss})
        patch.setattr(simulate, "train_step", step.run)
        patch.setattr(simulate, "commit", step.commit)
        patch.setattr(simulate, "text_inputs", lambda _, shape, __: {"input_ids": torch.empty(shape[:2], dtype=torch.long)})
        model = adapted(row)
        setup = Setup(run["attn_impl"], "full", "adamw-foreach", "blocks", "none", (7, 5))
        simulator = Simulator(model, setup, UNITS, None)
        model.enable_input_require_grads()
        shape = Shape(run["batch_size"], run["seq_len"], 0)
        events = compose(constant_form(simulator.trace(shape)), shape, 1, None)
    return replay(events.sizes, events.segments, Allocator())


@pytest.mark.parametrize("key", [pytest.param(key, marks=() if key in QUICK else pytest.mark.slow) for key in UNQUANTISED])
def test_a_measured_step_is_predicted_to_the_byte(key: str) -> None:
    result, measured = predicted(key), UNQUANTISED[key]["measured"]
    peaks = {phase.phase: phase.allocated_peak_bytes for phase in result.phases}
    assert peaks["forward"] == measured["peak_forward_mib"] * MIB
    assert peaks["backward"] == measured["peak_backward_mib"] * MIB
    assert result.peak_allocated == measured["peak_allocated_mib"] * MIB
    assert result.peak_reserved == pytest.approx(measured["peak_reserved_mib"] * MIB, rel=RESERVED_WITHIN)


@pytest.mark.slow
def test_the_page_shows_every_row(root: Path) -> None:
    rows = []
    for key, row in UNQUANTISED.items():
        result, measured = predicted(key), row["measured"]
        allocated = result.peak_allocated - round(measured["peak_allocated_mib"] * MIB)
        reserved = result.peak_reserved - round(measured["peak_reserved_mib"] * MIB)
        rows.append(f"| {key} | {result.peak_allocated:,} | {allocated:+,} | {result.peak_reserved:,} | {reserved:+,} |")
    page = (root / "docs" / "accuracy.md").read_text(encoding="utf-8")
    missing = [row for row in rows if row not in page]
    assert not missing, "docs/accuracy.md has to show\n" + "\n".join(missing)
