"""What a text says besides its message: which model, how many samples, how long, on how many GPUs, and where it failed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from oomph.core.oom.families import Family, families
from oomph.diagnosis_records import OomMessage

KINDS = (
    "scores",
    "logits",
    "mlp",
    "hidden",
    "weight",
    "expert weights",
    "flat",
    "bucket",
    "dispatch",
    "mask",
    "vision scores",
)
"""The kinds of tensors that a request can be for."""

_ACTIVATIONS = ("scores", "logits", "mlp", "hidden", "dispatch", "mask", "vision scores")
_LENGTHS = re.compile(
    r"(?:model_max_length|max_seq_len(?:gth)?|cutoff_len|max_length|block_size|max_prompt_length|seq_len(?:gth)?|sequence_len|max_model_len)"
    r"[\"']?\s{0,2}[=: ]\s{0,2}[\"']?(\d{2,7})\b"
)
_BATCHES = re.compile(
    r"(?:per_device_train_batch_size|train_micro_batch_size_per_gpu|micro_batch_size|batch_size_training|micro_batch|batch_size)"
    r"[\"']?\s{0,2}[=: ]\s{0,2}[\"']?(\d{1,5})\b"
)
_WORLDS = re.compile(
    r"(?:--?nproc[_-]per[_-]node|--?num[_-]gpus|world[_-]size|num_processes)[\"']?\s{0,2}[=: ]\s{0,2}[\"']?(\d{1,5})\b",
    re.IGNORECASE,
)
_VERSION = re.compile(r"\btorch(?: version:?|==|-| |=|:)\s?v?([12])\.(\d{1,2})\b", re.IGNORECASE)
_CODE_CLUES: tuple[tuple[re.Pattern[str], dict[str, float]], ...] = (
    (
        re.compile(
            r"softmax|attn_weights|attention_scores|baddbmm|matmul\(q|torch\.matmul\(\s?query|attn_output_weights|eager_attention"
        ),
        {"scores": 40},
    ),
    (re.compile(r"clip_encoder|siglip|vision_tower|modeling_clip|visual|vit\b|eva_"), {"vision scores": 30, "mlp": 2}),
    (
        re.compile(r"cross_entropy|log_softmax|lm_head|logits|loss_utils|loss_fct|compute_loss_from|embed_out|vocab_parallel"),
        {"logits": 40},
    ),
    (re.compile(r"sharded_moe|dispatch_mask|combine_weights|einsum\(\"sec|top2gating|top1gating"), {"dispatch": 100}),
    (
        re.compile(r"\bmlp\b|gate_proj|up_proj|down_proj|act_fn|\bsilu\b|\bgelu\b|swiglu|\bfc1\b|\bfc2\b|dense_h_to_4h"),
        {"mlp": 30},
    ),
    (re.compile(r"experts?\b|grouped_mm|block_sparse_moe"), {"expert weights": 8, "mlp": 2, "dispatch": 2}),
    (re.compile(r"rmsnorm|layer_?norm|rotary|residual|hidden_states = |norm\.py"), {"hidden": 15}),
    (re.compile(r"causal_mask|_prepare_4d|attention_mask|_update_causal_mask|_make_causal_mask"), {"mask": 40}),
    (
        re.compile(
            r"flatten_dense_tensors|stage_1_and_2\.py|stage3\.py|stage_3|fp32_partition|flat_param|_flat_param|fused_optimizer|bf16_optimizer"
        ),
        {"flat": 60, "bucket": 15, "weight": 2},
    ),
    (
        re.compile(r"reduce_bucket|ipg|allreduce_bucket|_reduce_scatter|all_gather|allgather|_coalesced"),
        {"bucket": 20, "flat": 3, "weight": 2},
    ),
    (re.compile(r"exp_avg|torch/optim|adamw?\.py|zeros_like\("), {"weight": 10, "expert weights": 10, "flat": 15}),
    (
        re.compile(
            r"safetensors|load_state_dict|set_module_tensor|from_pretrained|_load_\w+|\bt\.to\(|param_applied|caching_allocator_warmup"
        ),
        {"weight": 15, "expert weights": 15, "flat": 3},
    ),
    (re.compile(r"dequantize|bitsandbytes|dequant"), {"weight": 20}),
)
_PHASE_CLUES: dict[str, dict[str, float]] = {
    "load": {**dict.fromkeys(_ACTIVATIONS, 0.05), "weight": 6, "expert weights": 6, "flat": 6},
    "optimizer": {**dict.fromkeys(_ACTIVATIONS, 0.03), "weight": 6, "expert weights": 6, "flat": 8, "bucket": 2},
    "checkpoint saving": {**dict.fromkeys(_ACTIVATIONS, 0.03), "weight": 6, "flat": 3},
    "evaluation": {"logits": 3, "flat": 0.2, "bucket": 0.2},
    "forward": {"weight": 0.3, "flat": 0.1, "bucket": 0.1},
    "recompute": {"weight": 0.3, "flat": 0.1, "bucket": 0.2},
    "backward": {"flat": 0.5},
}


class Clues(NamedTuple):
    """What else a text says.

    Attributes:
        factors: by how much more likely a kind of tensor is, by its name in `KINDS`.
        reasons: a sentence for the clues of a kind.
        named: the families that the text names.
        built: those whose code the traceback goes through, by its file.
        lengths: lengths of sequences that it gives.
        batches: micro-batches that it gives.
        gpus: numbers of GPUs that it gives or that its ranks show.
        latest: the year after which no model can be that is meant; 0 where nothing says it.
    """

    factors: dict[str, float]
    reasons: dict[str, str]
    named: frozenset[str]
    built: frozenset[str]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    gpus: tuple[int, ...]
    latest: float


def find_clues(text: str, message: OomMessage, messages: Sequence[OomMessage]) -> Clues:
    """The clues of a text about one of its messages.

    Args:
        text: all of it; of a long one the last million characters and the first hundred thousand count.
        message: the one that is explained.
        messages: all of them.
    """
    text = text if len(text) <= 1_200_000 else text[:100_000] + text[-1_000_000:]
    low = text.lower()
    factors = dict(_PHASE_CLUES.get(message.phase, {}))
    reasons: dict[str, str] = {}
    code = _innermost(message)
    for pattern, effects in _CODE_CLUES if code else ():
        match = pattern.search(code)
        for kind, factor in effects.items() if match else ():
            factors[kind] = factors.get(kind, 1.0) * factor
            if factor >= 10 and match:
                reasons.setdefault(kind, f"the traceback names `{match[0].strip()}`")
    named = frozenset(family.name for family in families() if _is_named(family, low, False))
    files = "\n".join(frame.file.replace("\\", "/").lower() for frame in message.frames)
    built = frozenset(family.name for family in families() if _is_named(family, files, True))
    ranks = [m.rank for m in messages if m.rank is not None]
    gpus = [*_numbers(_WORLDS, text), *([max(ranks) + 1] if len(set(ranks)) > 1 else [])]
    return Clues(
        factors,
        reasons,
        named,
        built,
        tuple(dict.fromkeys(_numbers(_LENGTHS, text)))[:6],
        tuple(dict.fromkeys(n for n in _numbers(_BATCHES, text) if 0 < n <= 4096))[:4],
        tuple(dict.fromkeys(n for n in gpus if 0 < n <= 4096))[:4],
        _latest(message, text),
    )


def _innermost(message: OomMessage) -> str:
    """The last frames of a traceback as one text in lower case."""
    return "\n".join(f"{f.file.replace(chr(92), '/')} {f.function} {f.code}" for f in message.frames[-6:]).lower()


def _is_named(family: Family, low: str, by_file: bool) -> bool:
    """Whether a text names a family, or the file with its code."""
    return any(word in low for word in family.words if word.startswith("modeling_") == by_file)


def _numbers(pattern: re.Pattern[str], text: str) -> list[int]:
    return [int(match[1]) for match in pattern.finditer(text)][:40]


def _latest(message: OomMessage, text: str) -> float:
    """The year in which what a version of PyTorch was used for had been released, with a year of grace."""
    match = _VERSION.search(text)
    version = (int(match[1]), int(match[2])) if match else None
    if version is None and message.torch:
        last = re.search(r"(?:up to|to) (\d)\.(\d{1,2})$|^(\d)\.(\d{1,2})$", message.torch)
        version = tuple(map(int, [value for value in last.groups() if value])) if last else None  # type: ignore[assignment]
    if version is None:
        return 0.0
    return next((year for least, year in _YEARS if version <= least), 0.0)


_YEARS = (((1, 10), 2022.8), ((1, 13), 2023.8), ((2, 0), 2024.3), ((2, 1), 2024.7), ((2, 2), 2025.1))
