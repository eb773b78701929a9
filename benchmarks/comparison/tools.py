"""Asks the other estimators. Runs in an environment of its own, which `run.py` makes from requirements.txt.

    python tools.py QUESTIONS ANSWERS

reads a JSON list of questions and writes the answers, in bytes of one GPU, with the versions of the programs. Each program
gets the model that trains, without weights, what is frozen marked as such.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoConfig

from oomph.core.forms import FormKey
from oomph.live.model import build
from oomph.live.source import build_model, read_model_config

PROGRAMS = ("accelerate", "deepspeed", "torch-kitsune", "torch", "transformers")


def main() -> None:
    """Answers every question of a file."""
    questions = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = [answer(question) for question in questions]
    versions = {name: metadata.version(name) for name in PROGRAMS}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "answers": answers}), encoding="utf-8")


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """What each program says; None where it has no estimate for such a run."""
    model = model_of(question, question["precision"])
    return {
        "accelerate": ask_accelerate(model_of(question, "float32")),
        "deepspeed": ask_deepspeed(model, question),
        "kitsune": ask_kitsune(model, question),
        "kitsune_wrapped": ask_kitsune(Wrapped(model), question),
    }


def model_of(question: dict[str, Any], precision: str) -> nn.Module:
    """The model on the meta device: of a key of Oomph's traces, or of a configuration."""
    if "key" in question:
        key = FormKey.from_json({**question["key"], "precision": precision})
        return build_model(key, read_model_config(key))
    config = AutoConfig.for_model(**question["config"])
    return build(config, getattr(torch, precision), question["attention"])


def ask_accelerate(model: nn.Module) -> dict[str, int]:
    """``accelerate estimate-memory`` with the model in place of the one that it would build from a hub id.

    Args:
        model: in float32, as the command builds it.

    Returns:
        The bytes that it prints as "Total Size" and "Training using Adam" for float16; bfloat16 is none of its choices.
    """
    from accelerate.commands import estimate  # type: ignore[import-not-found,import-untyped,unused-ignore]

    arguments = argparse.Namespace(model_name="", library_name="transformers", trust_remote_code=False, dtypes=["float16"])
    with mock.patch.object(estimate, "create_empty_model", return_value=model):
        ((_, _, total, training),) = estimate.gather_data(arguments)
    return {"total": int(total), "training": max(training.values())}


def ask_deepspeed(model: nn.Module, question: dict[str, Any]) -> dict[str, int] | None:
    """DeepSpeed's estimators of model states, nothing offloaded; None for runs without ZeRO-2 or ZeRO-3.

    They take the number of parameters: those that read it from a live model tell shared parameters by their addresses,
    which are all zero on the meta device.
    """
    if question["sharding"] not in ("zero2", "zero3"):
        return None
    from deepspeed.runtime.zero import stage3, stage_1_and_2  # type: ignore[import-not-found]

    total = sum(parameter.numel() for parameter in model.parameters())
    _, largest = stage3.model_to_params(model)
    machines = {"num_gpus_per_node": question["gpus"] // question["nodes"], "num_nodes": question["nodes"]}
    if question["sharding"] == "zero2":
        _, gpu = stage_1_and_2.estimate_zero2_model_states_mem_needs(total, **machines, cpu_offload=False)
    else:
        _, gpu, _ = stage3.estimate_zero3_model_states_mem_needs(
            total, largest, **machines, cpu_offload=False, cpu_offload_params=False
        )
    return {"total": gpu, "largest_layer_parameters": largest}


class _Messages(logging.Handler):
    """Keeps what a logger says."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Wrapped(nn.Module):
    """A language model behind an input of floats, with positions and a mask that transformers need not look into.

    torch-kitsune runs a model on random floats of shape [samples, tokens] on the meta device, where an embedding refuses
    floats and transformers asks for values of the mask and of the positions.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The logits, [samples, tokens, vocabulary]."""
        samples, tokens = values.shape
        positions = torch.arange(tokens, device=values.device).expand(samples, tokens)
        mask = torch.ones(samples, 1, tokens, tokens, dtype=torch.bool, device=values.device)
        logits: torch.Tensor = self.model(input_ids=values.long(), position_ids=positions, attention_mask=mask).logits
        return logits


def ask_kitsune(model: nn.Module, question: dict[str, Any]) -> dict[str, Any]:
    """torch-kitsune's prediction: on one GPU, on several, or with LoRA adapters on a frozen model.

    Returns:
        The bytes in all and those of activations, and why its traces of the model failed, where they did.
    """
    from kitsune.predict import LoRAConfig, estimate_lora_memory, estimate_multi_gpu, predict_memory  # type: ignore[import-not-found]

    logger, messages = logging.getLogger("kitsune.predict.activation_estimator"), _Messages()
    logger.setLevel(logging.DEBUG)
    logger.addHandler(messages)
    shape, samples, dtype = (question["tokens"],), question["micro_batch"], getattr(torch, question["precision"])
    if "rank" in question:
        adapters = LoRAConfig(rank=question["rank"], target_modules=tuple(question["targets"]), optimizer="adamw")
        result = estimate_lora_memory(model, shape, samples, dtype, adapters)
    elif question["sharding"] == "none":
        result = predict_memory(model, shape, samples, dtype, "adamw", training=True)
    else:
        gpus = question["gpus"]
        result = estimate_multi_gpu(model, shape, samples * gpus, dtype, "adamw", question["sharding"], gpus)
    logger.removeHandler(messages)
    failed = [text for text in messages.texts if "failed" in text]
    return {"total": result.total_bytes, "activations": result.activation_bytes, "failed": failed}


if __name__ == "__main__":
    main()
