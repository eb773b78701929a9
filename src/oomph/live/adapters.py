"""LoRA adapters in a model on the meta device, put there by PEFT's own code.

Checked with PEFT 0.20. The model stays of its own class. A layer `q_proj` that gets an adapter becomes a module that holds it
as `q_proj.base_layer`, beside `q_proj.lora_A.default.weight` and `q_proj.lora_B.default.weight`. Adapters are float32, as
``autocast_adapter_dtype`` makes them whatever the model is held in (tuners/tuners_utils.py, ``cast_adapter_dtype``).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from typing import Any
from unittest import mock

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oomph.errors import UserError
from oomph.live.model import part_finder
from oomph.recipe.schema import Lora

_ADAPTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D)
"""What PEFT has an adapter for (tuners/lora/layer.py, ``dispatch_default``); bitsandbytes' layers are linear ones too."""
_BESIDE_LANGUAGE = ("vision", "projector", "head")
_RENAMING = "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers"
"""Takes the names of layers that transformers 4 had for those of fused experts. The recipe's are of the model as it is."""
_INSTALL = "install it with `pip install 'oomph[lora]'`"
_CHANGE = "change target_modules or target_parameters of the `lora` section"


def add_adapters(model: PreTrainedModel, section: Lora) -> None:
    """Puts the adapters of a stage's `lora` section into the model, in place.

    Nothing is changed where names are wrong.

    Args:
        model: on the meta device; its linear layers may be quantized already.
        section: the stage's `lora`. Names are the ends of modules' and parameters' full names, wherever they are in the
            model, as PEFT reads them; ``all-linear`` is every linear layer of the language model but its head.

    Raises:
        UserError: PEFT is not installed, or for all that cannot be adapted at once.
    """
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError:
        raise UserError("the stage trains LoRA adapters, and PEFT, which makes them, is not installed", _INSTALL) from None
    modules, problems = _modules(model, section)
    problems += _parameter_problems(model, section)
    if problems:
        raise UserError(problems, "a name is the end of a full name, as in `q_proj` or `mlp.experts.gate_up_proj`")
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=2 * section.rank if section.alpha is None else section.alpha,
        lora_dropout=section.dropout,
        target_modules=modules,
        target_parameters=section.target_parameters or None,
    )
    with warnings.catch_warnings(), mock.patch(_RENAMING, return_value=None):
        warnings.simplefilter("ignore")
        try:
            peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
        except ValueError as error:
            raise UserError(f"PEFT refuses the adapters: {str(error).splitlines()[0]}", _CHANGE) from error


def _modules(model: PreTrainedModel, section: Lora) -> tuple[list[str], list[str]]:
    """The full names of the modules that get an adapter, and what is wrong with the names in the recipe."""
    named = dict(model.named_modules())
    if section.target_modules == "all-linear":
        part = part_finder(model)
        linear = [path for path, module in named.items() if isinstance(module, nn.Linear)]
        chosen = [path for path in linear if part(f"{path}.weight") not in _BESIDE_LANGUAGE]
        return chosen, [] if chosen else [f"{type(model).__name__} has no linear layer that `all-linear` could mean"]
    found: dict[str, None] = {}
    problems = []
    for name in section.target_modules:
        hits = _ending(named, name)
        if not hits:
            names = _last_steps(path for path, module in named.items() if isinstance(module, nn.Linear))
            problems.append(f"lora.target_modules: no module's name ends in `{name}`; linear layers end in {names}")
        refused = [path for path in hits if not isinstance(named[path], _ADAPTED)]
        if refused:
            kind = type(named[refused[0]]).__name__
            problems.append(f"lora.target_modules: `{name}` is {refused[0]}, of class {kind}, for which there is no adapter")
        found |= dict.fromkeys(hits)
    return list(found), problems


def _parameter_problems(model: PreTrainedModel, section: Lora) -> list[str]:
    """What is wrong with the parameters that the recipe names."""
    named = dict(model.named_parameters())
    problems = []
    for name in section.target_parameters:
        hits = _ending(named, name)
        if not hits:
            names = _last_steps((path for path, parameter in named.items() if parameter.dim() == 3), 2)
            problems.append(
                f"lora.target_parameters: no parameter's name ends in `{name}`; parameters that hold experts end in {names}"
            )
        flat = [path for path in hits if named[path].dim() not in (2, 3)]
        if flat:
            problems.append(f"lora.target_parameters: {flat[0]} has {named[flat[0]].dim()} dimensions; adapters need 2 or 3")
    if section.target_parameters and section.dropout:
        problems.append("lora.dropout: adapters of target_parameters have no dropout; set it to 0 or leave these out")
    return problems


def _ending(names: Iterable[str], end: str) -> list[str]:
    """The names that are `end`, or end in it after a dot."""
    return [name for name in names if name == end or name.endswith(f".{end}")]


def _last_steps(names: Iterable[str], steps: int = 1) -> str:
    found = sorted({".".join(name.split(".")[-steps:]) for name in names})
    return ", ".join(found) or "nothing: there is none"


def check_rules(patterns: Iterable[str], has_adapters: bool) -> None:
    """Refuses rules for adapters on a stage that has none.

    Raises:
        UserError: a rule names the part `lora`.
    """
    rules = [text for text in patterns if text.partition(":")[0] == "lora"]
    if rules and not has_adapters:
        raise UserError(
            [f"the rule `{text}` is about adapters, and the stage has no `lora` section" for text in rules],
            "add one, `lora: {rank: 16}` for instance, or leave the rule out",
        )

