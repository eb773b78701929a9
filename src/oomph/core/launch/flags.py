"""The flags of a training as values: each is used, known to be without effect on memory, or named as not understood.

Where flags are declared: ``llava/train/train.py`` of haotian-liu/LLaVA and of LLaVA-VL/LLaVA-NeXT,
``moellava/train/train.py`` of PKU-YuanGroup/MoE-LLaVA, and ``TrainingArguments`` of huggingface/transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from oomph.core.launch.shell import Word

WITHOUT_EFFECT = frozenset(
    """
    adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices cache_dir data_folder data_path data_seed
    dataloader_drop_last dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_find_unused_parameters ddp_timeout disable_tqdm dispatch_batches do_eval do_predict
    do_train early_mix_text eval_accumulation_steps eval_on_start
    eval_capacity_factor eval_delay eval_steps eval_strategy evaluation_strategy frames_upbound full_determinism
    greater_is_better group_by_length group_by_modality_length group_by_modality_length_auto group_by_varlen hub_model_id
    hub_private_repo hub_strategy hub_token ignore_data_skip image_folder include_num_input_tokens_seen is_multimodal
    label_smoothing_factor lazy_preprocess length_column_name load_best_model_at_end local_rank log_level log_on_each_node
    logging_dir logging_first_step logging_nan_inf_filter logging_steps logging_strategy lora_weight_path
    lr_scheduler_kwargs master_addr master_port metric_for_best_model min_capacity mm_perceiver_pretrained
    mm_use_im_patch_token mm_use_im_start_end mpt_attn_impl neftune_noise_alpha output_dir overwrite_output_dir
    prediction_loss_only pretrain_mm_mlp_adapter push_to_hub remove_unused_columns report_to restore_callback_states
    resume_from_checkpoint rope_scaling_factor rope_scaling_type run_name save_on_each_node save_only_model save_safetensors
    save_steps save_strategy save_total_limit seed skip_memory_metrics tf32 trust_remote_code use_fast
    verbose_logging version video_folder vision_tower_pretrained warmup_steps
    """.split()
)
"""Flags that change no tensor's size on the GPU, or by a few kilobytes: paths, logs, the optimizer's numbers, rounding."""

_YES = {"true", "1", "yes", "y", "t", ""}
_NO = {"false", "0", "no", "n", "f"}


class Flags:
    """Reads flags one by one, remembers which were asked for, and collects what is wrong with them.

    Attributes:
        problems: a sentence for each value that is none.
        used: the names that were asked for.
    """

    def __init__(self, flags: dict[str, tuple[Word, ...]]) -> None:
        self._flags = flags
        self.problems: list[str] = []
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._flags

    def without_switch(self, names: Iterable[str]) -> None:
        """Flags that have no effect, as what they belong to is off."""
        self.used.update(names)

    def text(self, name: str, default: str = "") -> str:
        """The value as text; what only a running shell knows stays as it is written."""
        self.used.add(name)
        values = self._flags.get(name)
        return default if not values else " ".join(word.text for word in values)

    def known(self, name: str) -> bool:
        """Whether the value is in the script, and not in what surrounds it."""
        return not any(word.unknown for word in self._flags.get(name, ()))

    def words(self, name: str) -> list[str]:
        """All values of a flag that takes several."""
        self.used.add(name)
        return [part for word in self._flags.get(name, ()) for part in word.text.split()]

    def on(self, name: str, default: bool = False) -> bool:
        """A switch: ``--bf16 True``, or ``--bf16`` alone."""
        if name not in self._flags:
            self.used.add(name)
            return default
        value = self.text(name).strip().lower()
        if value in _YES or value in _NO:
            return value in _YES
        self._wrong(name, "True or False")
        return default

    def whole(self, name: str, default: int, least: int = 1) -> int:
        """A whole number."""
        value = self.number(name, default)
        if value != int(value) or value < least:
            self._wrong(name, f"a whole number from {least}")
            return default
        return int(value)

    def number(self, name: str, default: float) -> float:
        """A number."""
        if name not in self._flags:
            self.used.add(name)
            return default
        text = self.text(name).strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        self._wrong(name, "a number")
        return default

    def not_understood(self) -> list[str]:
        """The flags that nobody asked for and that are not known to be without effect."""
        return sorted(name for name in self._flags if name not in self.used and name not in WITHOUT_EFFECT)

    def _wrong(self, name: str, expected: str) -> None:
        text = self.text(name)
        if not self.known(name):
            self.problems.append(f"--{name} is {text}, which the script does not set: only its surroundings know it")
        else:
            self.problems.append(f"--{name} must be {expected}, not {text!r}")
