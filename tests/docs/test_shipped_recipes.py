"""Every shipped recipe is planned, its document has what scripts rely on, and odd settings are planned or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from oomph import cli
from oomph.records import Plan

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.y*ml"))
CHOICE = {"micro_batch", "accumulation", "effective_batch", "checkpointing", "attention", "loss", "sharding"}
REQUEST = {"bytes", "shape", "dtype", "op", "module", "phase"}
PREDICTION = {
    *("fits", "allocated_peak_bytes", "reserved_peak_bytes", "outside_bytes", "usable_bytes", "by_role", "by_module"),
    *("failing_request", "largest_requests", "error_bound", "leaves_out"),
}

pytestmark = pytest.mark.slow


class Answer(NamedTuple):
    """What a command line said: its exit code, its document, its errors."""

    code: int
    document: Any
    errors: str


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `oomph plan --json` in this process, without a ladder unless that is asked for."""

    def run(recipe: str | Path, *arguments: str, ladder: bool = False) -> Answer:
        code = cli.run(["plan", str(recipe), "--json", *([] if ladder else ["--no-ladder"]), *arguments])
        out, errors = capsys.readouterr()
        return Answer(code, json.loads(out) if out else None, errors)

    return run


def assert_whole(answer: Answer) -> None:
    """The document has the names that scripts rely on, reads back, and its sums add up."""
    assert answer.code in (0, 1), answer.errors
    document = answer.document
    assert document["schema"] == 1
    assert Plan.from_json(document).to_json() == document
    assert answer.code == (not all(stage["prediction"]["fits"] for stage in document["stages"]))
    for stage in document["stages"]:
        prediction = stage["prediction"]
        assert set(stage) >= {"name", "choice", "prediction"}
        assert set(stage["choice"]) >= CHOICE
        assert set(prediction) >= PREDICTION
        assert all(set(request) >= REQUEST for request in prediction["largest_requests"])
        failing = prediction["failing_request"]
        assert (failing is None) == prediction["fits"]
        total = prediction["allocated_peak_bytes"]
        if failing is not None:
            assert set(failing) >= REQUEST | {"in_use_bytes"}
            total = failing["in_use_bytes"]
            assert failing["bytes"] + failing["reserved_bytes"] > prediction["usable_bytes"]
        assert sum(prediction["by_role"].values()) == sum(prediction["by_module"].values()) == total
        assert 0 < prediction["error_bound"] < 1


def test_recipes_are_shipped() -> None:
    assert len(RECIPES) >= 2


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_shipped_recipe_is_planned(plan: Any, recipe: Path) -> None:
    answer = plan(ROOT / recipe)
    assert_whole(answer)
    stages = yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8"))["stages"]
    assert [stage["name"] for stage in answer.document["stages"]] == [stage["name"] for stage in stages]


# A small model in folders of its own, and settings that few would think of.

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 7}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of LLaVA with a small CLIP, 100 tokens an image, and a small Phi, beside weights that nobody reads."""
    folder = tmp_path_factory.mktemp("small")
    for name, config in {
        "clip": {"model_type": "clip_vision_model", "image_size": 140, "patch_size": 14, **SIZES},
        "phi": {"model_type": "phi", "vocab_size": 503, **SIZES},
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "model.safetensors").write_bytes(b"no weights at all")
    trained = {"vision": "frozen", "projector": 1.0e-3, "language": 1.0e-5, "head": 1.0e-5}
    recipe = {
        "name": "small",
        "model": {"vision": str(folder / "clip"), "projector": "mlp2x_gelu", "language": str(folder / "phi")},
        "data": {"max_tokens": 320},
        "hardware": {"gpu": "RTX-4090"},
        "stages": [{"name": "tune", "train": trained, "effective_batch": 6}],
    }
    file = folder / "small.yaml"
    file.write_text(json.dumps(recipe))
    return file


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["micro_batch=1"],
        ["stages.tune.effective_batch=1"],
        ["data.images_per_sample=3", "micro_batch=1", "eval_batch=6"],
        ["data.max_tokens=100"],
        ["data.max_tokens=1", "data.image_tokens_count=false"],
        ["data.max_tokens=1", "data.images_per_sample=0", "micro_batch=1"],
        ["data.max_tokens=1000000", "attention=eager", "micro_batch=1"],
        ["model.projector=mlp3x_gelu"],
        ["eval_batch=none"],
        ["eval_batch=100000"],
    ],
    ids=" ".join,
)
def test_odd_settings_are_planned(plan: Any, small: Path, settings: list[str]) -> None:
    answer = plan(small, *settings)
    assert_whole(answer)
    (stage,) = answer.document["stages"]
    assert stage["samples_tokens"] >= stage["image_tokens"]


@pytest.mark.parametrize(
    "settings",
    [[], ["data.max_tokens=1", "data.images_per_sample=0"]],
    ids=" ".join,
)
def test_odd_settings_have_a_ladder_or_a_nearest(plan: Any, small: Path, settings: list[str]) -> None:
    answer = plan(small, *settings, ladder=True)
    assert_whole(answer)
    (stage,) = answer.document["stages"]
    times = [rung["step_seconds"] for rung in stage["ladder"]]
    assert times == sorted(times)
    assert all(rung["prediction"]["fits"] and rung["choice"]["effective_batch"] == 6 for rung in stage["ladder"])
    assert (stage["nearest"] is None) == bool(stage["ladder"])
    assert answer.code == (0 if stage["prediction"]["fits"] else 1)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["data.max_tokens=99"], "data.images_per_sample 1 of 100 tokens each do not fit into data.max_tokens 99"),
        (["data.max_tokens=0"], "`data.max_tokens` must be at least 1"),
        (["data.images_per_sample=-1"], "`data.images_per_sample` must be at least 0"),
        (["data.max_tokens=1000000000000"], "needs more than 4 EiB"),
        (["micro_batch=7"], "micro_batch 7 is larger than the 6 samples that a GPU gets"),
        (["model.projector=identity"], "the rule `projector` matches no parameter"),
        (["model.projector=mlp0x_gelu"], "`model.projector`"),
        (["model.vision=openai/clip-vit-of-next-year"], "is not catalogued, no folder and not in the hub's local cache"),
        (["model.language=clip-vit-large-patch14-336-vision"], "clip_vision_model"),
        (["model.vision_feature_layer=-100"], "IndexError"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_settings_are_refused(plan: Any, small: Path, settings: list[str], error: str) -> None:
    code, document, errors = plan(small, *settings)
    assert code == 2, errors
    assert document is None
    assert error in errors


def test_a_hub_id_is_the_catalogued_model(plan: Any) -> None:
    """The same form from the cache, whatever the model is called."""
    published = ROOT / "recipes" / "moe-llava" / "phi2-clip336-as-published.yaml"
    by_name = plan(published, "--stage", "align")
    by_hub_id = plan(published, "--stage", "align", "model.language=microsoft/phi-2")
    assert by_hub_id == by_name._replace(errors="")
