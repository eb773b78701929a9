"""What a launch trains: the rules of its stage, its experts, adapters and quantized weights."""

from __future__ import annotations

from typing import Any

from oomph.core.launch.flags import Flags
from oomph.core.launch.knobs import Project

Rules = dict[str, float | str]

FROZEN = "frozen"
_LAYERS = {"first_half": "first_half", "second_half": "second_half", "sparse": "alternate", "dense": "all"}
# Names of the feed-forward layers, as MoE-LLaVA's scripts list them for each of its language models, and the pattern of the
# parameters whose names hold one of them.
_FEED_FORWARD = {
    frozenset({"fc1", "fc2"}): "*.mlp.fc*",
    frozenset({"gate_proj", "up_proj", "down_proj"}): "*.mlp.*",
    frozenset({"mlp.w1", "mlp.w2", "mlp.c_proj"}): "*.mlp.*",
}
_GATE = "wg"
_BELONG_TO_SWITCHES = (
    "capacity_factor double_quant ep_size lora_alpha lora_bias lora_dropout lora_r mm_vision_tower_lr moe_layers_idx moe_mode"
    " num_experts only_lora_ffn quant_type router_aux_loss_coef top_k_experts train_modules use_residual"
).split()
"""Flags of experts, adapters, quantized weights and the tower's training, which these switches turn on or off."""


def stage_name(flags: Flags) -> str:
    """What a stage is called: ``align`` where the projector alone trains, ``moe``, ``lora``, else ``finetune``."""
    if flags.on("moe_enable"):
        return "moe"
    if flags.on("tune_mm_mlp_adapter") or flags.text("mm_tunable_parts") == "mm_mlp_adapter":
        return "align"
    return "lora" if flags.on("lora_enable") else "finetune"


def trained(flags: Flags, project: Project, sees: bool, head: bool, notes: list[str]) -> dict[str, Any]:
    """The keys of a stage that say what trains: ``train``, and ``experts``, ``balance``, ``lora``, ``quantization``.

    Args:
        flags: the launch's.
        project: whose flags they are.
        sees: whether the model has a tower.
        head: whether its head has weights of its own.
        notes: takes what the reader has to know.
    """
    rate = flags.number("learning_rate", 5e-5)
    projector = flags.number("mm_projector_lr", rate)
    found: dict[str, Any] = {}
    parts: Rules = {"vision": FROZEN, "projector": projector, "language": rate, "head": rate}
    if flags.text("mm_tunable_parts"):
        parts = _tunable(flags, parts, notes)
    else:
        parts |= _frozen_by_switches(flags, parts)
    if flags.on("moe_enable"):
        experts, rules = _experts(flags, rate, notes)
        found |= experts
        parts = {part: value for part, value in parts.items() if part != "language" or not _splits(rules)} | rules
    if flags.on("lora_enable"):
        default = (128, 256.0) if project == "MoE-LLaVA" else (64, 16.0)
        found["lora"] = _lora(flags, default, notes)
        parts |= {"language": FROZEN, "head": FROZEN, "lora": rate}
    if flags.text("bits", "16") in ("4", "8"):
        found["quantization"] = _quantization(flags, notes)
        parts |= {"language": FROZEN, "head": FROZEN}
    hidden = [*([] if sees else ["vision", "projector"]), *([] if head else ["head"])]
    flags.without_switch(_BELONG_TO_SWITCHES)
    found["train"] = {part: value for part, value in parts.items() if part not in hidden}
    return found


def _frozen_by_switches(flags: Flags, parts: Rules) -> Rules:
    """LLaVA's switches in the order in which its ``train.py`` looks at them.

    `freeze_backbone` freezes what is below the head; the projector is made afterwards and trains.
    """
    changed: Rules = {}
    if flags.on("freeze_backbone"):
        changed |= {"language": FROZEN}
    if flags.on("tune_mm_mlp_adapter"):
        changed |= {"language": FROZEN, "head": FROZEN, "projector": parts["projector"]}
    if flags.on("freeze_mm_mlp_adapter"):
        changed |= {"projector": FROZEN}
    if flags.on("unfreeze_mm_vision_tower"):
        changed |= {"vision": _tower_rate(flags)}
    return changed


def _tower_rate(flags: Flags) -> float:
    return flags.number("mm_vision_tower_lr", flags.number("learning_rate", 5e-5))


def _tunable(flags: Flags, parts: Rules, notes: list[str]) -> Rules:
    """LLaVA-NeXT's list of parts, which takes the place of all other switches."""
    named = [name.strip() for name in flags.text("mm_tunable_parts").split(",") if name.strip()]
    switches = ("freeze_backbone", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower")
    ignored = [name for name in switches if flags.on(name)]
    notes += [f"--{name} has no effect beside --mm_tunable_parts" for name in ignored]
    known = {"mm_mlp_adapter", "mm_vision_tower", "mm_language_model", "mm_vision_resampler"}
    notes += [f"--mm_tunable_parts has {name}, which is no part that is known" for name in named if name not in known]
    language = parts["language"] if "mm_language_model" in named else FROZEN
    return {
        "vision": _tower_rate(flags) if "mm_vision_tower" in named else FROZEN,
        "projector": parts["projector"] if "mm_mlp_adapter" in named else FROZEN,
        "language": language,
        "head": language,
    }


def _experts(flags: Flags, rate: float, notes: list[str]) -> tuple[dict[str, Any], Rules]:
    """The experts, their balance, and the rules of what trains beside them.

    MoE-LLaVA trains every parameter whose name holds one of ``--train_modules``; without any, all train. The projector is
    switched on again afterwards (``moellava/model/llava_arch.py``).
    """
    counts = [int(text) for text in flags.words("num_experts") if text.isascii() and text.isdigit() and len(text) < 6] or [4]
    listed = [int(text) for text in flags.words("moe_layers_idx") if text.isascii() and text.isdigit() and len(text) < 6]
    mode = flags.text("moe_mode", "second_half")
    if mode not in _LAYERS:
        flags.problems.append(f"--moe_mode must be one of {', '.join(_LAYERS)}, not {mode!r}")
    layers: str | list[int] = listed or _LAYERS.get(mode, "alternate")
    experts = {
        "count": counts[0] if len(set(counts)) == 1 else counts,
        "top_k": flags.whole("top_k_experts", 2),
        "layers": layers,
        "residual": flags.on("use_residual"),
        "dispatch": "capacity",
        "capacity_factor": flags.number("capacity_factor", 1.0),
    }
    if flags.whole("ep_size", 1) > 1:
        notes.append("--ep_size above 1 puts experts on different GPUs, which is not predicted: each has all of them here")
    balance = {"kind": "micro-batch", "coefficient": flags.number("router_aux_loss_coef", 0.01)}
    return {"experts": experts, "balance": balance}, _expert_rules(flags, rate, layers)


def _expert_rules(flags: Flags, rate: float, layers: str | list[int]) -> Rules:
    words = set(flags.words("train_modules"))
    if not words:
        return {"experts": rate, "router": rate}
    feed_forward = frozenset(words - {_GATE})
    rules: Rules = {"router": rate if _GATE in words else FROZEN, "experts": rate if feed_forward else FROZEN, "head": FROZEN}
    if feed_forward and feed_forward not in _FEED_FORWARD:
        flags.problems.append(f"--train_modules {' '.join(sorted(words))} names no feed-forward layers that are known")
    if not feed_forward or layers == "all" or feed_forward not in _FEED_FORWARD:
        return {**rules, "language": FROZEN}
    pattern = _FEED_FORWARD[feed_forward]
    return {**rules, f"language:{pattern}": rate, f"language:!{pattern}": FROZEN}


def _splits(rules: Rules) -> bool:
    """Whether the language model is trained in part."""
    return any(pattern.startswith("language:") for pattern in rules)


def _lora(flags: Flags, default: tuple[int, float], notes: list[str]) -> dict[str, Any]:
    if flags.on("moe_enable"):
        flags.problems.append("--moe_enable with --lora_enable cannot be described: a recipe has no adapters on new experts")
    if flags.text("lora_bias", "none") != "none":
        notes.append(f"--lora_bias {flags.text('lora_bias')} trains biases too, which is not predicted")
    flags.on("only_lora_ffn", True)
    return {
        "rank": flags.whole("lora_r", default[0]),
        "alpha": flags.number("lora_alpha", default[1]),
        "dropout": flags.number("lora_dropout", 0.05),
    }


def _quantization(flags: Flags, notes: list[str]) -> dict[str, Any]:
    """Weights of 4 or 8 bits. LLaVA casts embedding and head back to bfloat16 where it trains in that."""
    kind = flags.text("quant_type", "nf4")
    if flags.text("bits") == "4" and kind != "nf4":
        notes.append(f"--quant_type {kind} is taken as nf4, which has the same bytes")
    four = flags.text("bits") == "4"
    section: dict[str, Any] = {"kind": "nf4" if four else "int8", "upcast": not flags.on("bf16")}
    return {**section, "double_quantization": flags.on("double_quant", True)} if four else section
