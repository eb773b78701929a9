"""Every catalogued language or vision-language model has a closed form, which its making checks at one more shape and depth."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from oomph.core.catalogue import MODELS, model_folder
from oomph.core.forms import FormKey
from oomph.core.stage import LOOPS_OVER_IMAGES
from oomph.errors import UserError
from oomph.live.model import build, part_finder, read_config
from oomph.live.source import make_form

TOWERS = {name for name in MODELS if name.startswith(("clip-", "siglip-"))}
TRAINED = ("language", "head")


def key_of(plain_key: FormKey, name: str) -> FormKey:
    """Language and head train, everything else is frozen; several images, two of them for towers that loop."""
    folder = model_folder(name)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    finder = part_finder(model := build(read_config(folder), torch.bfloat16, "sdpa"))
    parts = {finder(parameter) for parameter, _ in model.named_parameters()}
    several = -2 if content["model_type"] in LOOPS_OVER_IMAGES else 2
    return replace(
        plain_key,
        model=str(folder),
        trained=tuple(sorted(parts & set(TRAINED))),
        frozen=tuple(sorted(parts - set(TRAINED))),
        loss="chunked",
        checkpointing="blocks",
        vision_checkpointing="blocks",
        images=several if "vision_config" in content else 0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS) - TOWERS))
def test_a_catalogued_model_has_a_closed_form(plain_key: FormKey, name: str) -> None:
    traced = make_form(key_of(plain_key, name))
    assert traced.form is not None, traced.how
    assert not traced.form.work.note
    assert sum(parameter.numel for parameter in traced.form.parameters) == MODELS[name].parameters


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_a_tower_alone_is_no_model_to_train(plain_key: FormKey, name: str) -> None:
    with pytest.raises(UserError, match="is not a language model or a vision-language model"):
        key_of(plain_key, name)
