from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from oomph.core.catalogue import MODELS, find_model, model_folder, model_names
from oomph.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which the environment names."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def model(folder: Path, text: str = '{"model_type": "phi"}') -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    return folder


def refused(name: str) -> UserError:
    with pytest.raises(UserError) as caught:
        find_model(name)
    return caught.value


def test_every_catalogued_model_has_a_folder_with_its_configuration_alone() -> None:
    folders = model_folder("phi-2").parent
    assert sorted(folder.name for folder in folders.iterdir()) == model_names()
    for name in model_names():
        folder = model_folder(name)
        assert [path.name for path in folder.iterdir()] == ["config.json"]
        assert isinstance(json.loads((folder / "config.json").read_text())["model_type"], str)
        assert find_model(name) == folder


@pytest.mark.filterwarnings("default")
def test_parameter_counts_are_those_of_the_models_that_transformers_builds() -> None:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    built = {}
    for name in model_names():
        config = AutoConfig.from_pretrained(model_folder(name))
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel):
            if type(config) in auto._model_mapping:
                break
        with torch.device("meta"):
            built[name] = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    assert built == {name: known.parameters for name, known in MODELS.items()}


def test_the_sources_list_what_the_catalogue_holds() -> None:
    text = (model_folder("phi-2").parents[1] / "SOURCES.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    listed = {row[0]: (row[1], row[3]) for row in rows if len(row) == 5 and row[0] in MODELS}
    assert listed == {name: (known.hub_id or "-", f"{known.parameters:,}") for name, known in MODELS.items()}


def test_a_hub_id_of_the_catalogue_needs_no_cache(cache: Path) -> None:
    for name, known in MODELS.items():
        if known.hub_id:
            assert find_model(known.hub_id) == model_folder(name)
    assert not cache.exists()


def test_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "mine")
    assert find_model(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert find_model("mine").resolve() == folder
    assert find_model("./mine").resolve() == folder
    model(tmp_path / "phi-2")
    assert find_model("phi-2") == model_folder("phi-2")
    assert find_model("./phi-2").resolve() == tmp_path / "phi-2"


def test_a_cached_hub_id_is_the_main_branch(cache: Path) -> None:
    repository = cache / "models--org--name"
    old, new = model(repository / "snapshots" / "aaa"), model(repository / "snapshots" / "bbb")
    (repository / "snapshots" / "ccc").mkdir()
    os.utime(old, (1, 1))
    assert find_model("org/name") == new
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaa\n")
    assert find_model("org/name") == old


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    snapshot = Path("hub") / "models--org--name" / "snapshots" / "aaa"
    below_home = model(tmp_path / ".cache" / "huggingface" / snapshot)
    assert find_model("org/name") == below_home
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    below_xdg = model(tmp_path / "xdg" / "huggingface" / snapshot)
    assert find_model("org/name") == below_xdg
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    below_hf = model(tmp_path / "hf" / snapshot)
    assert find_model("org/name") == below_hf


def test_a_snapshot_without_configuration_is_not_there(cache: Path) -> None:
    (cache / "models--org--name" / "snapshots" / "aaa").mkdir(parents=True)
    error = refused("org/name")
    assert "not in the hub's local cache" in error.problems[0]
    assert "hf download org/name config.json" in error.hint


@pytest.mark.parametrize(
    ("name", "guess"),
    [("phi2", "phi-2"), ("Phi-2", "phi-2"), ("microsoft/phi2", "microsoft/phi-2"), ("qwen3-30b-a3", "qwen3-30b-a3b")],
)
def test_a_misspelt_name_suggests_the_right_one(cache: Path, name: str, guess: str) -> None:
    assert refused(name).problems[0].endswith(f"; did you mean {guess}?")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere/at/all", "~nobody-of-that-name/x", "a\0b", "../no-such-folder-here"])
def test_what_is_nowhere(cache: Path, name: str) -> None:
    error = refused(name)
    assert "is not catalogued, no folder" in error.problems[0]
    assert "phi-2" in error.hint


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    assert "holds no config.json" in refused(str(tmp_path)).problems[0]


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = model(tmp_path / "mine") / "config.json"
    assert "is a file" in refused(str(file)).problems[0]


@pytest.mark.parametrize("text", ["", "{", '{"model_type": ', "[1]", "{}", '{"model_type": 3}', "\xff", "[" * 100_000])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    error = refused(str(model(tmp_path / "mine", text)))
    assert "config.json" in error.problems[0]
    assert "\n" not in error.problems[0]


def test_an_unknown_catalogued_name() -> None:
    with pytest.raises(UserError, match="no model 'phi-3' is catalogued; did you mean phi-2"):
        model_folder("phi-3")
