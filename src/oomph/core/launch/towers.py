"""Which catalogued models the parts of a launch are: the tower, the projector, the language model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from oomph.core.catalogue import MODELS, find_model
from oomph.errors import UserError

_TOWER = "clip-vit-large-patch14-336-vision"
# Llama's two sizes are those of Vicuna, which LLaVA-1.5 is made of; transformers' conversions of it are catalogued.
_VICUNA = re.compile(r"(?:vicuna|llama-2|llava-v1\.5)-(7b|13b)", re.IGNORECASE)


_OWN = re.compile(r"^(?:moe_)?llava_")
_EXAMPLES = {"vision": _TOWER, "language": "phi-2", "model": "llava-1.5-7b-hf"}


class Model(NamedTuple):
    """What a recipe names as the model, and what the reader has to know of it."""

    name: str | dict[str, Any]
    notes: tuple[str, ...] = ()


def model_of(language: str, tower: str, projector: str, layer: int, select: str) -> Model:
    """The model of a launch, with catalogued names where there are some.

    Args:
        language: ``model_name_or_path``.
        tower: the vision tower; empty for a model that sees nothing.
        projector: its type, as LLaVA names it.
        layer: the hidden state of the tower that is read.
        select: ``patch``, or ``cls_patch`` to keep the class token.
    """
    if not tower:
        return Model(_catalogued(language))
    vision = _catalogued(tower)
    vision = f"{vision}-vision" if f"{vision}-vision" in MODELS else vision
    match = _VICUNA.search(language)
    if match and vision == _TOWER and projector == "mlp2x_gelu" and not _is_here(language):
        name = f"llava-1.5-{match[1].lower()}-hf"
        rows = "its vocabulary has 32,064 rows, 64 more than Vicuna's"
        return Model(name, (f"{language} with this tower is taken as the catalogued {name}: {rows}",))
    parts = {
        "vision": vision,
        "projector": projector,
        "language": _catalogued(language),
        "vision_feature_layer": layer,
        "vision_feature_select": "full" if select == "cls_patch" else "patch",
    }
    return Model(parts)


def missing(model: Any) -> UserError | None:
    """What of a recipe's model is not to be had without a network, if anything; with what to put in its place."""
    parts = {} if isinstance(model, str) else {f"model.{part}": getattr(model, part) for part in ("vision", "language")}
    names = parts or {"model": model}
    problems: dict[str, list[str]] = {}
    for key, name in names.items():
        try:
            kind = _kind(find_model(name))
            if key == "model.language" and _OWN.match(kind):
                own = f"a checkpoint of LLaVA's own code ({kind})"
                problems[key] = [f"{key}: {name} is {own}, which transformers does not read"]
        except UserError as error:
            unset = " (the script does not set it)" if "$" in name else ""
            problems[key] = [f"{key}{unset}: {problem}" for problem in error.problems]
    if not problems:
        return None
    examples = " ".join(f"{key}={_EXAMPLES[key.rpartition('.')[2]]}" for key in problems)
    way = f"put one of the same shape in its place, for example {examples}"
    return UserError([problem for found in problems.values() for problem in found], f"{way}; or fetch its config.json once")


def _kind(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))


def has_head(model: Any) -> bool:
    """Whether the model's head has weights of its own, and does not share those of the embedding."""
    try:
        folder = find_model(model if isinstance(model, str) else model["language"])
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return True
    text = content.get("text_config", content)
    return not bool(text.get("tie_word_embeddings", content.get("tie_word_embeddings", False)))


def image_side(model: Any) -> int | None:
    """Pixels of a side of the tower's image; None where its configuration does not say it."""
    if isinstance(model, str):
        return 336
    try:
        content = json.loads((find_model(model["vision"]) / "config.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return None
    side = content.get("vision_config", content).get("image_size")
    return side if isinstance(side, int) else None


def _catalogued(name: str) -> str:
    """The catalogue's name of a hub id; else the name itself."""
    return next((own for own, model in MODELS.items() if model.hub_id == name), name)


def _is_here(name: str) -> bool:
    try:
        return (Path(os.path.expanduser(name)) / "config.json").is_file()
    except (OSError, ValueError):
        return False
