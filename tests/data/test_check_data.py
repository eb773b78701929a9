"""`oomph train RECIPE --check-data`."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from oomph import cli


@pytest.fixture
def saved(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that saves a recipe as a file in the folder that the command runs in."""
    monkeypatch.chdir(workshop.folder)
    monkeypatch.setenv("NO_COLOR", "1")

    def save(**data: Any) -> str:
        recipe = {
            "name": "small",
            "model": {"vision": "./tower", "projector": "linear", "language": "./language"},
            "data": {"max_tokens": 48, **data},
            "hardware": {"gpu": "A100-SXM4-40GB"},
            "stages": [
                {"name": "align", "train": {"projector": 1.0e-3}, "effective_batch": 4, "data": {"chat_template": "plain"}},
                {"name": "tune", "train": {"language": 1.0e-4}, "effective_batch": 2},
            ],
        }
        (workshop.folder / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return "small.yaml"

    return save


def test_good_data_is_summed_up(workshop: Any, saved: Any, talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.write(
        "a.json", [talk("<image>", "A dog.", image=workshop.picture("a.png")), talk("<image>", "A cat. " * 20, image="a.png")]
    )
    workshop.write("b.jsonl", [talk("Hi", "Ho")])
    files = [{"path": "a.json", "images": "pictures", "weight": 1.5}, {"path": "b.jsonl"}]
    recipe = saved(files=files, evaluation=[{"path": "b.jsonl"}])
    assert cli.run(["train", recipe, "--check-data", "--stage", "tune"]) == 0
    shown = capsys.readouterr()
    assert shown.out == GOOD
    assert "pixels are normalised as CLIP's are" in shown.err
    assert cli.run(["train", recipe, "--check-data"]) == 0
    both = capsys.readouterr().out
    assert both.endswith(GOOD)
    assert "steps: 1 of stage align" in both
    assert all(len(line) <= 80 for line in both.splitlines())


GOOD = """\
an epoch has 4 samples; steps: 2 of stage tune

a.json: 2 samples, 2 images
  tokens of a sample                min 31, median 39, max 48
  of them image tokens              min 16, median 16, max 16
  label tokens                      26
  cut to max_tokens 48              1 sample by 61 tokens in all
  weight                            1.5

b.jsonl: 1 sample, 0 images
  tokens of a sample                min 16, median 16, max 16
  label tokens                      3
  cut to max_tokens 48              none

evaluation: b.jsonl: 1 sample, 0 images
  tokens of a sample                min 16, median 16, max 16
  label tokens                      3
  cut to max_tokens 48              none
"""


def test_bad_data_is_told_once_for_all_stages(workshop: Any, saved: Any, talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.write("a.jsonl", [talk("<image>", "A dog.", image="gone.png", id="x"), talk("Hi")])
    recipe = saved(files=[{"path": "a.jsonl", "images": "pictures"}])
    assert cli.run(["train", recipe, "--check-data"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    errors = [line for line in shown.err.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: a.jsonl:1 (sample 'x'): the image 'gone.png' is not in the folder pictures",
        "error: a.jsonl:2: it has no turn of the assistant, so there is nothing to learn from it",
    ]
    assert "hint: mend or remove these samples" in shown.err


def test_a_recipe_without_data_says_how_to_name_some(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", saved(), "--check-data"]) == 2
    shown = capsys.readouterr().err
    assert "error: stage align: data.files names no file" in shown
    assert "hint: data.files: [{path: train.json, images: pictures}]" in shown
