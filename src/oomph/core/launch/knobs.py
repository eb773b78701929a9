"""The memory knobs of a launch: attention, precision, optimizer, sharding and the rest, as these projects have them.

Attention. MoE-LLaVA has the option for flash attention commented out; its Phi (``moellava/model/language_model/phi``) computes
scores and softmax in float32, its StableLM the softmax alone. LLaVA's ``train_mem.py`` asks for flash attention,
``train_xformers.py`` for the memory-efficient one, and LLaVA-NeXT's ``train.py`` for flash attention unless
``--attn_implementation`` says otherwise. Elsewhere transformers 4.37, which they pin, takes sdpa where a model has it.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any, Literal

from oomph.core.launch.command import Training
from oomph.core.launch.deepspeed import DeepSpeed, read_deepspeed
from oomph.core.launch.flags import Flags

Project = Literal["LLaVA", "LLaVA-NeXT", "MoE-LLaVA"]

_NEXT = ("mm_tunable_parts", "mm_patch_merge_type", "unfreeze_mm_vision_tower", "mm_vision_tower_lr", "attn_implementation")
_ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash"}
_OPTIMIZERS = {
    "adamw_torch": "adamw-foreach",
    "adamw_torch_fused": "adamw-fused",
    "adamw_hf": "adamw-loop",
    "adamw_bnb_8bit": "adamw-8bit",
    "adamw_8bit": "adamw-8bit",
    "paged_adamw_8bit": "adamw-8bit-paged",
}
_NOT_PREDICTED = {
    "torch_compile": "--torch_compile is predicted as if it were off",
    "torch_compile_backend": "",
    "auto_find_batch_size": "--auto_find_batch_size halves the batch after a failure; predicted is that of the script",
    "enable_ring_attention": "--enable_ring_attention is predicted as if it were off",
    "fsdp_config": "--fsdp_config is not read",
    "fsdp_transformer_layer_cls_to_wrap": "",
}


def project_of(training: Training, flags: Flags) -> Project:
    """Whose training it is, by the path of its program and by flags that only one of them has."""
    if "moellava" in training.program.lower() or "image_tower" in flags or "moe_enable" in flags:
        return "MoE-LLaVA"
    return "LLaVA-NeXT" if any(name in flags for name in _NEXT) else "LLaVA"


def knobs(training: Training, flags: Flags, script: Path, notes: list[str]) -> dict[str, Any]:
    """The section `memory` of the recipe; what the reader has to know is added to `notes`.

    Raises:
        UserError: the DeepSpeed configuration cannot be read.
    """
    project = project_of(training, flags)
    engine = read_deepspeed(flags.text("deepspeed"), script) if flags.text("deepspeed") else None
    notes += engine.notes if engine else ()
    precision = _precision(flags, engine, project)
    sharding = _sharding(training, flags, engine, notes)
    memory: dict[str, Any] = {
        "micro_batch": flags.whole("per_device_train_batch_size", 8),
        "eval_batch": flags.whole("per_device_eval_batch_size", 8) if _evaluates(flags) else "none",
        "checkpointing": "blocks" if flags.on("gradient_checkpointing", project == "LLaVA-NeXT") else "none",
        "precision": precision,
        "attention": _attention(training, flags, project, notes),
        "loss": "chunked" if flags.on("use_liger_kernel") else "full-shifted",
        "optimizer": _optimizer(flags, engine, notes),
        "sharding": sharding,
        "expandable_segments": training.expandable_segments,
    }
    if engine and engine.optimizer_offload:
        memory["optimizer_offload"] = True
    if precision == "bfloat16" and not sharding.startswith("zero"):
        memory["master_weights"] = False
    for name, note in _NOT_PREDICTED.items():
        if flags.text(name) not in ("", "False", "false"):
            notes += [note] if note else []
    return memory


def _evaluates(flags: Flags) -> bool:
    return "per_device_eval_batch_size" in flags or flags.text("evaluation_strategy", flags.text("eval_strategy", "no")) != "no"


def _precision(flags: Flags, engine: DeepSpeed | None, project: Project) -> str:
    """DeepSpeed casts the model to 16 bits. Without it the Trainer runs autocast, over 16-bit weights where they load so."""
    bf16, fp16 = flags.on("bf16"), flags.on("fp16")
    if not bf16 and not fp16:
        return "float32"
    kind = "bfloat16" if bf16 else "float16"
    loads_16_bits = bf16 and project != "MoE-LLaVA"
    return kind if engine or loads_16_bits else f"{kind}-mixed"


def _attention(training: Training, flags: Flags, project: Project, notes: list[str]) -> str:
    asked, model = flags.text("attn_implementation"), flags.text("model_name_or_path").lower()
    program = PurePath(training.program).stem.rpartition(".")[2]
    if asked in _ATTENTION:
        return _ATTENTION[asked]
    if asked:
        notes.append(f"--attn_implementation {asked} is not known and taken as sdpa")
    if "xformers" in program:
        return "efficient"
    if project == "MoE-LLaVA":
        return _moe_llava_attention(model, program)
    if project == "LLaVA-NeXT" or "mem" in program:
        return "flash"
    notes.append("attention is taken as sdpa, as transformers 4.37 picks it; with an older one, add attention=eager")
    return "sdpa"


def _moe_llava_attention(model: str, program: str) -> str:
    if "phi" in model:
        return "eager-fp32"
    if "stablelm" in model:
        return "eager"
    others = ("qwen", "minicpm", "openchat", "mistral", "mpt")
    return "flash" if "mem" in program and not any(name in model for name in others) else "sdpa"


def _optimizer(flags: Flags, engine: DeepSpeed | None, notes: list[str]) -> str:
    """DeepSpeed's own where its file names one, else the Trainer's, by default PyTorch's AdamW over lists of tensors."""
    asked = flags.text("optim", "adamw_torch")
    if engine and engine.optimizer:
        return engine.optimizer
    if asked not in _OPTIMIZERS:
        notes.append(f"--optim {asked} is no optimizer that can be predicted, and is taken as adamw_torch")
    return _OPTIMIZERS.get(asked, "adamw-foreach")


def _sharding(training: Training, flags: Flags, engine: DeepSpeed | None, notes: list[str]) -> str:
    fsdp = flags.text("fsdp")
    if engine:
        alone = engine.sharding == "ddp" and training.gpus == 1
        return "none" if alone else engine.sharding
    if training.config:
        notes.append(f"accelerate's --config_file {training.config} is not read: what it sets of DeepSpeed or FSDP is missing")
    if fsdp and training.gpus != 1:
        notes.append(f"--fsdp {fsdp} is taken as PyTorch's fully_shard, which divides the same tensors")
        return "fsdp2" if "full_shard" in fsdp else "fsdp2-no-reshard" if "shard_grad_op" in fsdp else "ddp"
    return "none" if training.gpus == 1 else "ddp"
