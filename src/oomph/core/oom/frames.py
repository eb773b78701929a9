"""Python tracebacks: their frames, the module that failed, and the phase of training in which it was.

Phases are told by the functions and files of PyTorch, transformers, accelerate, DeepSpeed, PEFT and Lightning that stand in a
traceback: `Function.backward` of torch/utils/checkpoint.py recomputes, torch/autograd/graph.py runs the backward pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from oomph.core.oom.cleaning import Line
from oomph.diagnosis_records import FailedPhase, Frame

MOST_FRAMES = 120
"""Frames of a traceback that are kept, the innermost."""

_FRAME = re.compile(r"""\bFile ["']?([^"'\n]{1,400}?)["']?, line (\d{1,7})(?:, in ([^\s,]{1,200}))?""")
_NOTEBOOK = re.compile(r"\bFile (\S{1,300}\.pyx?):(\d{1,7}), in ([\w.<>]{1,200})")
_RICH = re.compile(r"[\s│|]*(\S{1,300}\.pyx?):(\d{1,7}) in (\S{1,200})")
_OLD_NOTEBOOK = re.compile(r"\s*(\S{1,300}\.pyx?) in ()([\w.<>]{1,200})\(")
_MARKS = re.compile(r"^[\s~^|│]*$")
_MOST_LETTERS = 2_000
_START = "Traceback (most recent call last)"

_MODEL_FILE = re.compile(
    r"(?:modeling_|modelling_|modular_|llava|/models?/|clip_encoder|siglip|builder|moe|/loss/|loss_utils|attention|phi|qwen|llama|gpt)"
)
_LIBRARY = re.compile(
    r"(?:site-packages|dist-packages|lib/python[\d.]+)/(?:torch|deepspeed|accelerate|peft|lightning|pytorch_lightning|fairscale|apex|bitsandbytes)/"
)
_RULES: tuple[tuple[FailedPhase, re.Pattern[str], str], ...] = (
    (
        "checkpoint saving",
        re.compile(
            r":(?:_?save_checkpoint\w*|save_pretrained|_?save_model|_save_optimizer_and_scheduler|save_state|_save|save_zero_checkpoint"
            r"|get_state_dict|_consolidated_16bit_state_dict|_?zero3_consolidated_16bit_state_dict|save_16bit_model|safe_save_model\w*"
            r"|maybe_zero_3|get_peft_state\w*|full_state_dict|optim_state_dict|full_optim_state_dict|_full_post_state_dict_hook)$"
        ),
        "saves a checkpoint",
    ),
    (
        "evaluation",
        re.compile(
            r":(?:evaluate|_evaluate|evaluation_loop|prediction_loop|prediction_step|validation_step|_run_validation|generate|_maybe_log_save_evaluate"
            r"|nested_concat|_pad_across_processes|_nested_gather|nested_gather|_run_evaluate|eval_step|validate)$"
        ),
        "evaluates",
    ),
    (
        "optimizer",
        re.compile(
            r"torch/optim/\w+\.py:(?!profile_hook_step|wrapper|_use_grad\b)\w+$|bitsandbytes/optim/\w+\.py:|deepspeed/ops/adam/\w+\.py:|apex/optimizers/\w+\.py:"
            r"|:(?:_?optimizer_step|optimizer_step|_take_model_step|initialize_optimizer_states|clip_grad_norm_?|_multi_tensor_adamw?"
            r"|_single_tensor_adamw?|unscale_grads|_unscale_grads_|unscale_and_clip_grads|get_grad_norm_direct|scaled_global_norm)$"
        ),
        "updates the weights",
    ),
    (
        "recompute",
        re.compile(
            r"(?:utils/checkpoint|activation_checkpointing/checkpointing|memory_efficient_checkpoint|tensor_parallel/random)\.py:"
            r"(?:backward|unpack_hook|recompute_fn|recompute|_recompute\w*|unpack)$"
        ),
        "runs a checkpointed block a second time",
    ),
    (
        "backward",
        re.compile(
            r"torch/autograd/(?:__init__|graph|function)\.py:(?:backward|apply|_engine_run_backward|grad)$|torch/_tensor\.py:backward$|:backward$"
            r"|:(?:reduce_independent_p_g_buckets_and_remove_grads|reduce_ipg_grads|reduce_partition_and_remove_grads|_post_backward\w*|__reduce_and_partition_ipg_grads)$"
        ),
        "runs the backward pass",
    ),
    (
        "load",
        re.compile(
            r":(?:from_pretrained|_load_pretrained_model|_load_state_dict_into\w*|load_state_dict|load_checkpoint|_load_checkpoint|set_module_tensor_to_device"
            r"|_load_parameter_into_model|load_checkpoint_and_dispatch|dispatch_model|caching_allocator_warmup|load_pretrained_model|init_empty_weights|load_model"
            r"|prepare_model_for_kbit_training|initialize_moe_modules|initialize_vision_modules|_move_model_to_device|replace_with_bnb_linear|load_weights"
            r"|_configure_distributed_model|_broadcast_model|deepspeed_init|_prepare_deepspeed|_configure_zero_optimizer|initialize|_wrap_model"
            r"|_setup_for_real_optimizer|_create_fp32_partitions|_create_fp16_partitions_with_defragmentation|_create_fp32_grad_partitions"
            r"|_convert|to|cuda|half|float|bfloat16|_apply|convert|__init__|__new__|_?materialize\w*|_init_param\w*)$"
        ),
        "loads or sets up the model",
    ),
    (
        "communication",
        re.compile(
            r"torch/distributed/distributed_c10d\.py:(?:all_gather\w*|all_reduce|barrier|broadcast|init_process_group|reduce_scatter\w*)$"
        ),
        "exchanges between GPUs",
    ),
    (
        "forward",
        re.compile(
            r"nn/modules/module\.py:(?:_call_impl|_wrapped_call_impl|_slow_forward)$|:(?:forward|training_step|compute_loss|_inner_training_loop|train_step|fwd)$"
            r"|nn/functional\.py:"
        ),
        "runs the forward pass",
    ),
)


def frames_before(lines: Sequence[Line], at: int, rank: int | None) -> tuple[Frame, ...]:
    """The frames of the traceback that ends before a line, the outermost first.

    Args:
        lines: of the text.
        at: the place of the line in them.
        rank: whose lines count; None for all that have no rank.
    """
    found: list[Frame] = []
    below = ""
    strangers = 0
    for place in range(at - 1, max(-1, at - 1200), -1):
        line = lines[place]
        if line.rank != rank and rank is not None and line.rank is not None:
            continue
        text = line.text
        if _START in text:
            break
        match = _frame(text[:_MOST_LETTERS])
        if match:
            name = (match[3] or "").rpartition(".")[2]
            found.append(Frame(match[1], int(match[2] or 0), name, below.strip(" │|")[:200]))
            below, strangers = "", 0
        elif not _MARKS.match(text):
            below, strangers = text, strangers + 1
            if strangers > 30:
                break
        if len(found) >= MOST_FRAMES:
            break
    return tuple(reversed(found))


def _frame(text: str) -> re.Match[str] | None:
    """The line of a traceback that names a frame, as Python, IPython or Rich writes it."""
    if "File " in text:
        return _FRAME.search(text) or _NOTEBOOK.search(text)
    return _RICH.match(text) or _OLD_NOTEBOOK.match(text) if ".py" in text else None


def phase_of(frames: Sequence[Frame]) -> tuple[FailedPhase, str]:
    """The phase in which a traceback was, and how that is known; both empty where nothing says it.

    A phase is told by the innermost frame that is sure of one; set-up counts only where no pass of the model is below it.
    """
    keys = [f"{_slashes(frame.file)}:{frame.function}" for frame in frames]
    for phase, pattern, what in _RULES:
        places = [number for number, key in enumerate(keys) if pattern.search(key)]
        if not places:
            continue
        if phase in ("load", "optimizer") and any(map(_is_pass, keys[places[-1] :])):
            continue
        if phase == "evaluation" and not _is_evaluating(keys, places):
            continue
        frame = frames[places[-1]]
        where = short_path(frame.file) + (f", line {frame.line}," if frame.line else "")
        return phase, f"{frame.function or 'the code'} in {where} {what}"
    return "", ""


def module_of(frames: Sequence[Frame]) -> str:
    """The innermost frame of a model's own code, as ``modeling_phi.py, line 384, forward``; empty where there is none."""
    own = [frame for frame in frames if not _LIBRARY.search(_slashes(frame.file))]
    models = [frame for frame in own if _MODEL_FILE.search(_slashes(frame.file).lower().rpartition("site-packages")[2])]
    passes = [frame for frame in own if frame.function == "forward"]
    if not models and not passes:
        return ""
    chosen = (models or passes)[-1]
    function = f", {chosen.function}" if chosen.function else ""
    line = f", line {chosen.line}" if chosen.line else ""
    return f"{_slashes(chosen.file).rpartition('/')[2]}{line}{function}"


def short_path(file: str) -> str:
    """The last two names of a path."""
    return "/".join(_slashes(file).split("/")[-2:])


def _slashes(file: str) -> str:
    return file.replace("\\", "/")


def _is_pass(key: str) -> bool:
    return key.endswith((":forward", ":_call_impl", ":training_step", ":compute_loss", "_tensor.py:backward"))


def _is_evaluating(keys: Sequence[str], places: Sequence[int]) -> bool:
    """Whether the evaluation is not only on the way to something else: `_maybe_log_save_evaluate` also saves."""
    return any(not keys[place].endswith("_maybe_log_save_evaluate") for place in places)
