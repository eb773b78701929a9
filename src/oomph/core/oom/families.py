"""Model families and their dimensions: those of the catalogue, and others that people fine-tune.

families.csv has what the models' own config.json on the Hugging Face hub says, and no dimensions for catalogued models, whose
configurations are read from the catalogue. Parameters are those that transformers counts, 0 where they are not needed.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple


class Family(NamedTuple):
    """A family's dimensions; 0 where it has none of a kind.

    Attributes:
        name: as people call it.
        released: the year, with a fraction; it tells which families a version of PyTorch can have met.
        hidden: width of the hidden states.
        intermediate: width inside the MLP, of an expert where there are experts.
        layers: blocks.
        heads: attention heads.
        vocabulary: rows of the output head.
        parameters: of the whole model, 0 where not known.
        experts: of a layer.
        per_token: experts that a token goes to.
        longest: about the longest sequence that it is trained on, with images.
        gated: whether the MLP has two matrices side by side before its activation.
        vision: whether it is an image encoder.
        weight: how often it is fine-tuned, in comparison; an estimate.
        words: what names it in a text, in lower case.
    """

    name: str
    released: float
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    parameters: int
    experts: int = 0
    per_token: int = 0
    longest: int = 131_072
    gated: bool = True
    vision: bool = False
    weight: float = 1.0
    words: tuple[str, ...] = ()


_PLAIN = ("phi", "clip_vision_model", "siglip_vision_model", "gpt2")


@functools.cache
def families() -> tuple[Family, ...]:
    """All families: the catalogued models by their names there, each with its vision tower, and the others."""
    found: list[Family] = []
    table = resources.files("oomph").joinpath("core", "oom", "families.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(table.splitlines()):
        found += [_given(row)] if row["heads"] else _catalogued(row, found)
    return tuple(found)


def _given(row: dict[str, str]) -> Family:
    numbers = [int(row[name]) for name in Family._fields[2:11]]
    hidden, intermediate, layers, heads, vocabulary, parameters, experts, per_token, longest = numbers
    return Family(
        row["name"],
        float(row["released"]),
        hidden,
        intermediate,
        layers,
        heads,
        vocabulary,
        parameters,
        experts,
        per_token,
        longest,
        gated=row["gated"] == "1",
        vision=row["vision"] == "1",
        weight=float(row["weight"]),
        words=tuple(row["words"].split()),
    )


def _catalogued(row: dict[str, str], before: Sequence[Family]) -> list[Family]:
    """The families of a catalogued model: its language model, and its vision tower if no other has the same."""
    name, released, weight, words = row["name"], float(row["released"]), float(row["weight"]), tuple(row["words"].split())
    folder = resources.files("oomph").joinpath("catalogue", "models", name)
    config = json.loads(folder.joinpath("config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    kind = str(text.get("model_type"))
    found: list[Family] = []
    if text.get("vocab_size") and "clip" not in kind and "siglip" not in kind:
        family = _family(name, released, text, int(row["parameters"]), weight, words)
        found.append(family._replace(longest=int(row["longest"])))
    tower = config.get("vision_config") or (text if "vision" in kind else {})
    if tower and not any(f.vision and (f.heads, f.hidden) == (_heads(tower), _hidden(tower)) for f in before):
        eyes = _family(f"vision tower of {name}", released, tower, 0, 1.0, words)
        found.append(eyes._replace(vision=True, vocabulary=0))
    return found


def _family(
    name: str, released: float, config: dict[str, Any], parameters: int, weight: float, words: tuple[str, ...]
) -> Family:
    experts = int(config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0)
    wide = int(config.get("intermediate_size") or 0)
    return Family(
        name,
        released,
        _hidden(config),
        int(config.get("moe_intermediate_size") or wide) if experts else wide,
        int(config.get("num_hidden_layers") or config.get("depth") or 0),
        _heads(config),
        int(config.get("vocab_size") or 0),
        parameters,
        experts,
        int(config.get("num_experts_per_tok") or 0),
        gated=str(config.get("model_type")) not in _PLAIN,
        weight=weight,
        words=words,
    )


def _hidden(config: dict[str, Any]) -> int:
    return int(config.get("hidden_size") or config.get("embed_dim") or 0)


def _heads(config: dict[str, Any]) -> int:
    return int(config.get("num_attention_heads") or config.get("num_heads") or 0)
