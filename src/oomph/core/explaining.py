"""What `oomph explain` does with ``--recipe`` or ``--script``: the stages that may have been running, and what they add."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from oomph.core.diagnosing import Subject, card_by_memory, explain_with
from oomph.core.forms import Source
from oomph.core.launch.importing import read_launches
from oomph.diagnosis_records import Diagnosis
from oomph.errors import UserError
from oomph.recipe import load, override, stage_of

_WHOLE_GPUS = 1_000_000


@dataclass(frozen=True)
class Run:
    """What is known of the run, as the command line gives it.

    Attributes:
        recipe: a recipe's file or name.
        script: a launch script.
        settings: ``key=value`` over either.
        stages: names of those that may have been running; none for all.
        gpu: the card.
        gpus: how many in all.
    """

    recipe: str | None = None
    script: str | None = None
    settings: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    gpu: str | None = None
    gpus: str | None = None


def explain_run(diagnosis: Diagnosis, run: Run, source: Source) -> Diagnosis:
    """The diagnosis with what the recipe or the script of the run adds.

    Raises:
        UserError: there is neither or both, one of them cannot be read, or the run that it describes is not possible.
    """
    if run.recipe is not None and run.script is not None:
        raise UserError("--recipe and --script are two descriptions of one run", "give one of them")
    if run.recipe is None and run.script is None:
        raise UserError(
            "settings, --stage, --gpu and --gpus go with --recipe or --script",
            "name what was run: --recipe moe-llava/phi2-clip336 or --script finetune.sh",
        )
    subjects, notes = _of_recipe(run) if run.recipe is not None else _of_script(run, diagnosis)
    return explain_with(diagnosis.message, subjects, source).added_to(diagnosis, notes)


def _of_recipe(run: Run) -> tuple[list[Subject], list[str]]:
    assert run.recipe is not None
    flags = [] if run.gpu is None else [f"hardware.gpu={json.dumps(run.gpu)}"]
    flags += [] if run.gpus is None else [f"hardware.gpus={run.gpus}"]
    recipe = override(load(run.recipe), [*run.settings, *flags])
    stages = [stage_of(recipe, name) for name in dict.fromkeys(run.stages)] or list(recipe.stages)
    return [Subject(recipe, stage) for stage in stages], []


def _of_script(run: Run, diagnosis: Diagnosis) -> tuple[list[Subject], list[str]]:
    """The trainings of the script. The card is that of the message where none is named."""
    assert run.script is not None
    notes = []
    gpu = run.gpu
    if gpu is None:
        gpu = card_by_memory(diagnosis.message.capacity_bytes)
        notes.append(f"the card is taken as {gpu}, by the memory that the message gives; --gpu names another")
    launches = read_launches(Path(os.path.expanduser(run.script)), gpu, _gpus(run.gpus), run.stages, run.settings)
    for launch in launches:
        where = f"{launch.recipe.stages[0].name}: " if len(launches) > 1 else ""
        notes += [f"{where}{note}" for note in launch.notes]
    return [Subject(launch.recipe, launch.recipe.stages[0]) for launch in launches], notes


def _gpus(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < len(text) < len(str(_WHOLE_GPUS)) and int(text) > 0):
        raise UserError(f"--gpus must be a whole number from 1, not {text!r}", "for example --gpus 8")
    return int(text)
