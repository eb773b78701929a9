"""From a launch script of LLaVA, LLaVA-NeXT or MoE-LLaVA to recipes: one for each training that it starts."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oomph.core.launch.command import MODEL, Training, trainings
from oomph.core.launch.flags import Flags
from oomph.core.launch.knobs import Project, knobs, project_of
from oomph.core.launch.shell import read_script
from oomph.core.launch.towers import has_head, image_side, missing, model_of
from oomph.core.launch.training import stage_name, trained
from oomph.errors import UserError
from oomph.recipe import Recipe, override
from oomph.recipe.reading import from_values
from oomph.recipe.suggest import did_you_mean

ASSUMED_GPUS = 8
"""GPUs of a launch that does not say how many: what the published scripts were run on."""

_TOWERS = ("image_tower", "vision_tower")
_PROJECTORS = ("image_projector_type", "mm_projector_type")
_TEXT_LIMIT = {"MoE-LLaVA": 512, "LLaVA": 512, "LLaVA-NeXT": 4096}
_RESAMPLERS = ("mm_resampler_type", "mm_spatial_pool_stride", "mm_spatial_pool_mode", "mm_spatial_pool_out_channels")


@dataclass(frozen=True)
class Launch:
    """A training that a script starts.

    Attributes:
        recipe: with one stage.
        notes: what was assumed, and what was not understood.
        line: of the script.
    """

    recipe: Recipe
    notes: tuple[str, ...]
    line: int


def read_launches(
    script: Path, gpu: str, gpus: int | None = None, stages: Sequence[str] = (), settings: Sequence[str] = ()
) -> list[Launch]:
    """The trainings of a script as recipes, in its order.

    Args:
        script: the file.
        gpu: the card, which no script says.
        gpus: how many in all; None to take what the launcher says.
        stages: those wanted, by the names of their stages; none for all.
        settings: ``key=value``, over each recipe.

    Raises:
        UserError: the file is no launch script, a value in it cannot be read, or a model is not known here.
    """
    found = trainings(read_script(script))
    if not found:
        raise UserError(
            f"{script} starts no training: no command in it has --{MODEL}",
            "it has to be a launch script as LLaVA's: deepspeed, torchrun, accelerate or python, a program, and its flags",
        )
    names = _names(found)
    unknown = [name for name in stages if name not in names]
    if unknown:
        guesses = [f"{script.name} starts no stage {name!r}{did_you_mean(name, names)}" for name in unknown]
        raise UserError(guesses, f"its stages are {', '.join(names)}")
    wanted = [(name, training) for name, training in zip(names, found, strict=True) if not stages or name in stages]
    launches = [_launch(script, name, training, gpu, gpus) for name, training in wanted]
    launches = [replace(launch, recipe=override(launch.recipe, settings)) for launch in launches]
    for launch in launches:
        if error := missing(launch.recipe.model):
            raise error
    return launches


def _names(found: Sequence[Training]) -> list[str]:
    """A name for each training; the second of a name gets a number."""
    names: list[str] = []
    for training in found:
        name = stage_name(Flags(training.flags))
        count = sum(other.partition("-")[0] == name for other in names)
        names.append(f"{name}-{count + 1}" if count else name)
    return names


def _launch(script: Path, name: str, training: Training, gpu: str, gpus: int | None) -> Launch:
    flags = Flags(training.flags)
    notes: list[str] = []
    training = _counted(training, gpus, notes)
    project = project_of(training, flags)
    memory = knobs(training, flags, script, notes)
    model = _model(flags, notes)
    sees = not isinstance(model, str) or any(flag in flags for flag in _TOWERS)
    assert training.gpus is not None
    accumulation = flags.whole("gradient_accumulation_steps", 1)
    stage = {
        "name": name,
        "effective_batch": memory["micro_batch"] * accumulation * training.gpus,
        **trained(flags, project, sees, has_head(model), notes),
        **_schedule(flags),
    }
    data = {
        "name": re.sub(r"[^\w.-]+", "-", script.name) or "script",
        "model": model,
        "data": _data(flags, project, model, sees, notes),
        "hardware": {"gpu": gpu, "gpus": training.gpus, "nodes": training.nodes},
        "memory": memory,
        "stages": [stage],
    }
    notes += _left(training, flags)
    if flags.problems:
        raise UserError(
            [f"{script.name}, line {training.line}: {problem}" for problem in dict.fromkeys(flags.problems)],
            "write the values into a copy of the script",
        )
    return Launch(from_values(data, f"{script.name}: "), tuple(dict.fromkeys(notes)), training.line)


def _counted(training: Training, gpus: int | None, notes: list[str]) -> Training:
    """The training with a number of GPUs."""
    if gpus is not None:
        return replace(training, gpus=gpus, nodes=training.nodes if gpus % training.nodes == 0 else 1)
    if training.gpus is None:
        assumed = f"{ASSUMED_GPUS} a machine are assumed, --gpus says otherwise"
        notes.append(f"the script does not say how many GPUs there are; {assumed}")
        return replace(training, gpus=ASSUMED_GPUS * training.nodes)
    return training


def _model(flags: Flags, notes: list[str]) -> str | dict[str, Any]:
    tower = next((flags.text(name) for name in _TOWERS if name in flags), "")
    projector = next((flags.text(name) for name in _PROJECTORS if name in flags), "linear")
    layer = int(flags.number("mm_vision_select_layer", -1))
    model = model_of(flags.text(MODEL), tower, projector, layer, flags.text("mm_vision_select_feature", "patch"))
    notes += model.notes
    if flags.text("video_tower"):
        notes.append("--video_tower and videos are not predicted")
    return model.name


def _data(flags: Flags, project: Project, model: Any, sees: bool, notes: list[str]) -> dict[str, Any]:
    """The limits of a sample. MoE-LLaVA cuts the text before it puts the image's tokens in, the others afterwards."""
    data: dict[str, Any] = {"max_tokens": flags.whole("model_max_length", _TEXT_LIMIT[project])}
    if not sees:
        return {**data, "images_per_sample": 0}
    aspect = flags.text("image_aspect_ratio", "square")
    data |= {"image_tokens_count": project != "MoE-LLaVA", "images_per_sample": 1}
    data["image_aspect_ratio"] = "square" if aspect == "square" else "pad"
    grid = flags.text("image_grid_pinpoints")
    if aspect.startswith("anyres"):
        data["images_per_sample"] = _tiles(grid, image_side(model), notes) + 1
    else:
        notes.append("one image a sample is assumed; data.images_per_sample=N says otherwise")
    merge = flags.text("mm_patch_merge_type", "flat")
    if merge != "flat":
        notes.append(f"--mm_patch_merge_type {merge} drops padding and adds line breaks between tiles, which is not counted")
    notes += [f"--{name} is not predicted" for name in _RESAMPLERS if flags.text(name)]
    return data


def _tiles(grid: str, side: int | None, notes: list[str]) -> int:
    """The most tiles that a picture is cut into, by the list of sizes that it may take."""
    try:
        sizes: Any = ast.literal_eval(grid) if grid else None
        most = max(int(width) * int(height) for width, height in sizes) // (side or 0) ** 2
    except (ValueError, TypeError, SyntaxError, ZeroDivisionError, MemoryError, RecursionError):
        why = "into how many tiles a picture is cut is not known"
        notes.append(f"{why}, and 4 are assumed; data.images_per_sample=N, one more than tiles, says otherwise")
        return 4
    notes.append(f"a picture is cut into at most {most} tiles and taken as {most + 1} images of a sample")
    return max(most, 1)


def _schedule(flags: Flags) -> dict[str, Any]:
    stage: dict[str, Any] = {"epochs": flags.number("num_train_epochs", 3.0), "weight_decay": flags.number("weight_decay", 0.0)}
    steps = flags.whole("max_steps", -1, least=-1)
    kind, share, norm = (
        flags.text("lr_scheduler_type", "linear"),
        flags.number("warmup_ratio", 0.0),
        flags.number("max_grad_norm", 1.0),
    )
    stage["schedule"] = kind if kind in ("cosine", "linear", "constant") else "cosine"
    return {
        **stage,
        "warmup": share,
        "max_grad_norm": norm if norm > 0 else "none",
        **({"steps": steps} if steps > 0 else {}),
    }


def _left(training: Training, flags: Flags) -> list[str]:
    """Notes on what of the launch was not used."""
    names = flags.not_understood()
    left = [f"not understood, and left out: {', '.join(f'--{name}' for name in names)}"] if names else []
    if training.lost:
        why = "a comment or a space after a backslash ends it earlier"
        left.append(f"{', '.join(training.lost[:4])} stand below the command and are no part of it: {why}")
    return left
