"""The models that are known without a network: the catalogue, local folders, and the hub's local cache.

Configurations and sizes come from ``catalogue/models``; ``catalogue/SOURCES.md`` says where each was read.
"""

from __future__ import annotations

import functools
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from oomph.errors import UserError
from oomph.recipe.suggest import nearest

_CONFIG = "config.json"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?$")


class Model(NamedTuple):
    """A catalogued model.

    Attributes:
        hub_id: its name on the Hugging Face hub; None for one that was put together from parts.
        parameters: how many it has when transformers builds it, tied weights once. SOURCES.md compares that with what
            is published.
    """

    hub_id: str | None
    parameters: int


MODELS = {
    "clip-vit-large-patch14-336": Model("openai/clip-vit-large-patch14-336", 427_944_193),
    "clip-vit-large-patch14-336-vision": Model(None, 303_507_456),
    "gemma-3-12b-it": Model("google/gemma-3-12b-it", 12_187_325_040),
    "glm-4.7-flash": Model("zai-org/GLM-4.7-Flash", 29_943_390_976),
    "internvl3-8b-hf": Model("OpenGVLab/InternVL3-8B-hf", 7_944_373_760),
    "kimi-k2.5": Model("moonshotai/Kimi-K2.5", 1_026_879_353_328),
    "llama-3.1-8b": Model("meta-llama/Llama-3.1-8B", 8_030_261_248),
    "llava-1.5-13b-hf": Model("llava-hf/llava-1.5-13b-hf", 13_351_494_656),
    "llava-1.5-7b-hf": Model("llava-hf/llava-1.5-7b-hf", 7_063_427_072),
    "mixtral-8x7b-v0.1": Model("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    "paddleocr-vl-1.5": Model("PaddlePaddle/PaddleOCR-VL-1.5", 905_601_648),
    "phi-2": Model("microsoft/phi-2", 2_779_683_840),
    "phi2-clip336-llava": Model(None, 3_092_320_256),
    "qwen1.5-1.8b": Model("Qwen/Qwen1.5-1.8B", 1_836_828_672),
    "qwen2.5-7b": Model("Qwen/Qwen2.5-7B", 7_615_616_512),
    "qwen2.5-vl-7b-instruct": Model("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
    "qwen3-30b-a3b": Model("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    "qwen3-vl-30b-a3b-instruct": Model("Qwen/Qwen3-VL-30B-A3B-Instruct", 31_070_754_032),
    "qwen3-vl-8b-instruct": Model("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
    "siglip-so400m-patch14-384": Model("google/siglip-so400m-patch14-384", 877_960_498),
    "siglip-so400m-patch14-384-vision": Model(None, 428_225_600),
    "smolvlm-instruct": Model("HuggingFaceTB/SmolVLM-Instruct", 2_246_272_880),
    "stablelm-2-1_6b": Model("stabilityai/stablelm-2-1_6b", 1_644_515_328),
}


def model_names() -> list[str]:
    """The catalogued models, in alphabetical order."""
    return sorted(MODELS)


def model_folder(name: str) -> Path:
    """The folder of a catalogued model; it holds ``config.json`` alone.

    Raises:
        UserError: no such model is catalogued.
    """
    if name not in MODELS:
        raise UserError(f"no model {name!r} is catalogued{_guess(name)}", _hint())
    return _models() / name


def find_model(name_or_path: str) -> Path:
    """The folder with the ``config.json`` of a model, found without a network.

    Tried in this order: a catalogued name; a folder; the hub id of a catalogued model; the hub's local cache.

    Args:
        name_or_path: ``phi-2``, ``./my-model``, ``microsoft/phi-2`` or another hub id.

    Raises:
        UserError: nothing of that name is here, or the folder has no readable ``config.json``.
    """
    if name_or_path in MODELS:
        return model_folder(name_or_path)
    path = Path(os.path.expanduser(name_or_path))
    try:
        if path.exists():
            return _checked(path)
    except OSError as error:
        raise UserError(f"the model {name_or_path!r} cannot be read: {error.strerror or error}") from None
    for name, model in MODELS.items():
        if model.hub_id == name_or_path:
            return model_folder(name)
    looks_like_hub_id = _HUB_ID.match(name_or_path) is not None
    cached = _cached(name_or_path) if looks_like_hub_id else None
    if cached is None:
        fetch = f"or fetch its configuration once: hf download {name_or_path} {_CONFIG}"
        raise UserError(
            f"the model {name_or_path!r} is not catalogued, no folder and not in the hub's local cache{_guess(name_or_path)}",
            f"{_hint()}; {fetch}" if looks_like_hub_id else _hint(),
        )
    return _checked(cached)


@functools.cache
def _models() -> Path:
    return Path(str(resources.files("oomph").joinpath("catalogue", "models")))


def _checked(folder: Path) -> Path:
    """The folder, if a transformers configuration can be read from it."""
    if not folder.is_dir():
        raise UserError(f"the model {str(folder)!r} is a file", f"name the folder that holds {_CONFIG}")
    config = folder / _CONFIG
    if not config.is_file():
        raise UserError(f"the folder {str(folder)!r} holds no {_CONFIG}", "transformers' save_pretrained writes such a folder")
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(config)!r} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise UserError(f"{str(config)!r} is no transformers configuration: it names no model_type")
    return folder


def _cached(hub_id: str) -> Path | None:
    """The snapshot of a hub id in the local cache that has a ``config.json``: the main branch's, else the newest.

    The layout is huggingface_hub's: models--org--name/{refs,snapshots}.
    """
    root = _hub_cache() / f"models--{hub_id.replace('/', '--')}"
    snapshots = [folder for folder in (root / "snapshots").glob("*") if (folder / _CONFIG).is_file()]
    main = root / "refs" / "main"
    revision = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    return max(snapshots, key=lambda folder: (folder.name == revision, folder.stat().st_mtime), default=None)


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it has fetched, by its own environment variables."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "hub"


def _guess(name: str) -> str:
    found = nearest(name, [*MODELS, *(model.hub_id for model in MODELS.values() if model.hub_id)])
    return f"; did you mean {found}?" if found else ""


def _hint() -> str:
    return f"name a folder with {_CONFIG} or one of {', '.join(model_names())}"
