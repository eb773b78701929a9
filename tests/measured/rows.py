"""The measured steps of t4_lora_sweep.json without quantised weights, traced as they were run.

What was run is the script measure.py of the source distribution fitcheck-llm 0.3.1: a model in fp16 is moved to the GPU, PEFT
adds LoRA adapters in fp32, blocks are checkpointed, the token ids are made once. Then come a step to warm up, a step whose
peaks are the row's, and a step with a peak for each phase, all with AdamW.

cuBLASLt had a workspace of its own, as it has by default up to torch 2.10 (pytorch pull request 168175 made the two libraries
share one), though the rows' archive says torch 2.14.

Tests and benchmarks load this file by its path.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from oomph.core.allocator import Allocator, Storages, Trail
from oomph.core.closed_form import constant_form
from oomph.core.events import Events
from oomph.core.layout import as_traced
from oomph.core.loading import as_scripts_do
from oomph.core.trace import Trace
from oomph.core.unroll import UNITS
from oomph.live.adapters import add_adapters
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.cuda_rules import CudaFunctions, CudaRules, Device
from oomph.live.fake import WorstCase, answering
from oomph.live.layers import shorten
from oomph.live.model import build, part_finder, to_fake
from oomph.live.optimizers import make_optimizer, states_of
from oomph.live.quantization import quantize, quantized_run
from oomph.live.simulate import fake_mode
from oomph.live.trace import Recorder, recording
from oomph.recipe.schema import Lora, Quantization

MIB = 1024**2
ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "t4_lora_sweep.json").read_text(encoding="utf-8"))["rows"]
T4 = Device((7, 5), multiprocessors=40, unified_workspaces=False)
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "tie_word_embeddings": "tie_word_embeddings",
}


def name(row: dict[str, Any]) -> str:
    """The row's model, attention and shape. Repeated rows have one name."""
    run = row["run"]
    return f"{row['model'].split('/')[1]}-{run['attn_impl']}-{run['batch_size']}x{run['seq_len']}"


MEASURED: list[dict[str, Any]] = [row for row in ROWS if row["run"]["quantization"] == "none"]
UNQUANTISED = {name(row): row for row in MEASURED}


@dataclass(frozen=True)
class Peaks:
    """Bytes allocated after loading, at the peak of the measured step and of each phase, and reserved after that step."""

    loaded: int
    forward: int
    backward: int
    optimizer: int
    allocated: int
    reserved: int

    @classmethod
    def of(cls, measured: dict[str, float]) -> Peaks:
        """The row's own."""
        phases = [measured[f"peak_{phase}_mib"] for phase in ("forward", "backward", "optimizer")]
        ends = measured["peak_allocated_mib"], measured["peak_reserved_mib"]
        return cls(*(int(mib * MIB) for mib in (measured["after_load_allocated_mib"], *phases, *ends)))


def config_of(row: dict[str, Any]) -> PretrainedConfig:
    """The configuration of the row's model."""
    known = row["model_config"]
    sizes = {ours: known[theirs] for theirs, ours in SIZES.items()} | {"max_position_embeddings": 32768}
    if row["model"].startswith("Qwen"):
        return Qwen2Config(**sizes)
    if row["model"].startswith("mistral"):
        return MistralConfig(sliding_window=None, head_dim=known["head_dim"], **sizes)
    return LlamaConfig(head_dim=known["head_dim"], **sizes)


def adapted(row: dict[str, Any]) -> PreTrainedModel:
    """The model with its adapters, which alone train, on the meta device."""
    run = row["run"]
    model = build(config_of(row), torch.float16, run["attn_impl"])
    if run["quantization"] != "none":
        quantize(model, Quantization(kind=run["quantization"], double_quantization=run["double_quant"]), lambda _: False)
    add_adapters(model, Lora(rank=run["lora_rank"], target_modules=run["lora_targets"]))
    part = part_finder(model)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(part(path) == "lora")
    apply_checkpointing(model, "blocks", "none")
    return model


@contextmanager
def rotary_of_transformers_5_17() -> Iterator[None]:
    """Angles as a product of matrices, as transformers had them up to 5.17 at least (models/llama/modeling_llama.py).

    transformers 5.23 multiplies elementwise. The product is the step's first, and brings the workspace of cuBLAS with it.
    """

    @torch.no_grad()
    def angles(module: Any, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = module.inv_freq[None, :, None].expand(position_ids.shape[0], -1, 1)
        half = (frequencies @ position_ids[:, None, :].float()).transpose(1, 2)
        whole = torch.cat((half, half), dim=-1)
        cosine = whole.cos() * module.attention_scaling
        sine = whole.sin() * module.attention_scaling
        return cosine.to(hidden.dtype), sine.to(hidden.dtype)

    with ExitStack() as stack:
        for kind in (LlamaRotaryEmbedding, MistralRotaryEmbedding, Qwen2RotaryEmbedding):
            stack.enter_context(mock.patch.object(kind, "forward", angles))
        yield


def trace(row: dict[str, Any], without: Collection[str] = ()) -> Trace:
    """The script's three steps on fake tensors, in the pieces ``load``, ``warmup``, ``step`` and ``phases``."""
    run = row["run"]
    mode, memo = fake_mode()
    model = adapted(row)
    stacks = shorten(model, UNITS)
    to_fake(model, mode)
    model.enable_input_require_grads()
    attention = "efficient" if run["attn_impl"] == "sdpa" else "eager"  # the script pins this backend of SDPA
    rules = CudaRules(T4, attention, without)
    recorder = Recorder(model, stacks, rules, memo.run)
    with ExitStack() as stack:
        for context in (warnings.catch_warnings(), answering(frozenset(without)), mode, WorstCase(), quantized_run(model)):
            stack.enter_context(context)
        warnings.simplefilter("ignore")
        recorder.start("load")
        recorder.load(model, part_finder(model))
        for entered in (rotary_of_transformers_5_17(), recording(recorder, model), CudaFunctions(rules)):
            stack.enter_context(entered)
        optimizer = make_optimizer(model, "adamw-foreach")
        with recorder.making_inputs():
            ids = torch.empty((run["batch_size"], run["seq_len"]), dtype=torch.long)
        for piece in ("warmup", "step", "phases"):
            recorder.start(piece)
            _step(recorder, model, optimizer, ids)
        recorder.finish()
    return recorder.trace


def _step(recorder: Recorder, model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """Gradients go when the next step begins, the logits when the step is over."""
    recorder.enter("optimizer")
    optimizer.zero_grad(set_to_none=True)
    recorder.enter("forward")
    outputs = model(input_ids=ids, labels=ids)
    recorder.enter("backward")
    outputs.loss.backward()
    recorder.enter("optimizer")
    optimizer.step()
    numbers = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    recorder.assign(states_of(optimizer, numbers), "optimizer")


def events(key: str, without: Collection[str] = ()) -> Events:
    """The events of a row's whole script, the layers in between unrolled, before the allocator replays them.

    Args:
        key: one of `UNQUANTISED`.
        without: names of CUDA rules to switch off.
    """
    shape = (1, 1, 0)  # of no account: the sizes are those of the trace
    return as_scripts_do(as_traced(constant_form(trace(UNQUANTISED[key], without)), shape))


def replayed(script: Events) -> Peaks:
    """The peaks as the script reads them: reset before the measured step, and before each phase of the last one."""
    allocator, found = Allocator(), dict[str, int]()
    storages = Storages(script.sizes, allocator.settings)
    pieces = {segment.name: segment for segment in script.segments}

    def run(timeline: Any) -> None:
        allocator.reset_peaks()
        allocator.run(timeline, storages, Trail())

    run(pieces["load"].timeline)
    loaded = allocator.allocated - storages_of_inputs(script)
    run(pieces["warmup"].timeline)
    run(pieces["step"].timeline)
    allocated, reserved = allocator.peak_allocated, allocator.peak_reserved
    last = pieces["phases"]
    starts = [at for at, _ in last.marks]
    for (at, phase), stop in zip(last.marks, [*starts[1:], len(last.timeline)], strict=True):
        run(last.timeline[at:stop])
        found[phase] = allocator.peak_allocated
    return Peaks(loaded, found["forward"], found["backward"], found["optimizer"], allocated, reserved)


def storages_of_inputs(script: Events) -> int:
    """Bytes of the token ids' block, which the script makes after it has read what the model takes."""
    return sum(-(-size // 512) * 512 for size, kind in zip(script.sizes, script.kinds, strict=True) if kind.role == "input")


@functools.cache
def predicted(key: str) -> Peaks:
    """The predicted peaks of a row."""
    return replayed(events(key))
