"""What the tracer says that a training step allocates is what the same step allocates, run for real on the CPU."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, PhiConfig, PretrainedConfig, Qwen3MoeConfig

from oomph.core.layout import Shape
from oomph.live.model import compose_llava
from oomph.live.simulate import Setup

BOUND = 0.005
NUMBER = 8
SYNONYMS = {"aten::lift_fresh": "aten::empty", "aten::new_zeros": "aten::zeros"}

# Operators whose CPU kernels take scratch, and what for.
KERNELS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "scores of one tile",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "scores and their gradient of one tile",
    "aten::convolution": "the image's patches as columns",
    "aten::convolution_backward": "the image's patches as columns, and contiguous copies",
    "aten::native_layer_norm": "a contiguous copy of its input",
    "aten::native_layer_norm_backward": "sums of the weight's gradient for each thread",
    "aten::masked_scatter_backward": "the mask as numbers and their running sum",
    "aten::sum": "bools as 64-bit integers",
    "aten::cumsum": "32-bit integers or bools as 64-bit integers",
    "aten::histc": "the edges and the counts for each thread",
    "aten::sort": "the indices of a stable sort",
}
