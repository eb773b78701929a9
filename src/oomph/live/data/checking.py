"""All data of a recipe, checked before anything is trained, and what it amounts to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from oomph.errors import UserError
from oomph.live.data.dataset import Dataset, open_dataset
from oomph.live.data.encoding import Cost
from oomph.live.data.reading import Numbers
from oomph.recipe import Recipe, Stage, data_of, stage_of

_TOKENS, _IMAGE_TOKENS = Cost._fields.index("tokens"), Cost._fields.index("image_tokens")
_IMAGES, _LABELS = Cost._fields.index("images"), Cost._fields.index("label_tokens")
_COLUMN = 34


@dataclass(frozen=True)
class FileSummary:
    """What one file amounts to. `tokens` and `image_tokens` are of a sample: the fewest, the median, the most."""

    path: str
    samples: int
    weight: float
    images: int
    tokens: tuple[int, int, int]
    image_tokens: tuple[int, int, int]
    label_tokens: int
    cut_samples: int
    cut_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class StageSummary:
    """What the data of stages amounts to that have the same."""

    stages: tuple[str, ...]
    epoch_samples: int
    epoch_steps: tuple[int, ...]
    files: tuple[FileSummary, ...]
    evaluation: tuple[FileSummary, ...]


def check_data(recipe: Recipe, names: Sequence[str] | None, notify: Callable[[str], None]) -> list[StageSummary]:
    """Checks the data of a recipe's stages, all of it anew, images included.

    Args:
        recipe: the recipe.
        names: the stages; None for all.
        notify: told in a sentence what is noteworthy and no mistake.

    Raises:
        UserError: something is wrong with it.
    """
    groups: dict[str, list[Stage]] = {}
    for stage in [stage_of(recipe, name) for name in names] if names else recipe.stages:
        groups.setdefault(data_of(recipe, stage).model_dump_json(), []).append(stage)
    problems: list[str] = []
    hint, summaries = "", []
    for stages in groups.values():
        try:
            summaries.append(_check(recipe, stages, notify))
        except UserError as error:
            problems, hint = problems + error.problems, error.hint
    if problems:
        raise UserError(list(dict.fromkeys(problems)), hint)
    return summaries


def _check(recipe: Recipe, stages: Sequence[Stage], notify: Callable[[str], None]) -> StageSummary:
    trained = open_dataset(recipe, stages[0], notify, fresh=True)
    order = trained.order()
    evaluated: tuple[FileSummary, ...] = ()
    if trained.encoder.data.evaluation:
        evaluated = _summaries(open_dataset(recipe, stages[0], notify, evaluation=True, fresh=True))
    return StageSummary(
        stages=tuple(stage.name for stage in stages),
        epoch_samples=order.epoch_samples,
        epoch_steps=tuple(order.steps(1, stage.effective_batch) for stage in stages),
        files=_summaries(trained),
        evaluation=evaluated,
    )


def _summaries(data: Dataset) -> tuple[FileSummary, ...]:
    found, first = [], 0
    for file in data.fingerprints():
        costs, cut = data.costs[first : first + file.samples], data.cut[first : first + file.samples]
        first += file.samples
        found.append(
            FileSummary(
                path=file.path,
                samples=file.samples,
                weight=file.weight,
                images=int(costs[:, _IMAGES].sum()),
                tokens=_spread(costs[:, _TOKENS]),
                image_tokens=_spread(costs[:, _IMAGE_TOKENS]),
                label_tokens=int(costs[:, _LABELS].sum()),
                cut_samples=int((cut > 0).sum()),
                cut_tokens=int(cut.sum()),
                max_tokens=data.encoder.data.max_tokens,
            )
        )
    return tuple(found)


def _spread(values: Numbers) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def describe(summaries: Sequence[StageSummary]) -> str:
    """The summaries as text."""
    lines = []
    for item in summaries:
        steps = ", ".join(f"{count:,} of stage {name}" for name, count in zip(item.stages, item.epoch_steps, strict=True))
        lines += [f"an epoch has {item.epoch_samples:,} samples; steps: {steps}", ""]
        lines += [line for file in item.files for line in _file(file, "")]
        lines += [line for file in item.evaluation for line in _file(file, "evaluation: ")]
    return "\n".join(lines).rstrip("\n") + "\n"


def _file(file: FileSummary, prefix: str) -> list[str]:
    counts = f"{_count(file.samples, 'sample')}, {_count(file.images, 'image')}"
    rows = [("tokens of a sample", _words(file.tokens))]
    if file.images:
        rows.append(("of them image tokens", _words(file.image_tokens)))
    rows.append(("label tokens", f"{file.label_tokens:,}"))
    lost = f"{_count(file.cut_samples, 'sample')} by {_count(file.cut_tokens, 'token')} in all"
    rows.append((f"cut to max_tokens {file.max_tokens:,}", lost if file.cut_samples else "none"))
    if file.weight != 1:
        rows.append(("weight", f"{file.weight:g}"))
    return [f"{prefix}{file.path}: {counts}", *(f"  {name:{_COLUMN}}{value}" for name, value in rows), ""]


def _words(spread: tuple[int, int, int]) -> str:
    return "min {:,}, median {:,}, max {:,}".format(*spread)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
