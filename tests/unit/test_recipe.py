from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from oomph.errors import UserError
from oomph.recipe import KNOBS, PARTS, Recipe, cover, data_of, load, memory_of, override, stage_of
from oomph.recipe.routing import check_dispatch, couples
from oomph.recipe.schema import SECTIONS
from oomph.records import Choice

PUBLISHED = "moe-llava/phi2-clip336-as-published"
OURS = "moe-llava/phi2-clip336"
SMALL = """
name: small
model: phi-2
data:
  max_tokens: 512
hardware:
  gpu: A100-SXM4-40GB
  gpus: 4
stages:
  - name: tune
    train:
      language: 1e-4
      head: frozen
    effective_batch: 16
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def changed(folder: Path, old: str, new: str) -> Path:
    assert SMALL.count(old) == 1
    return write(folder, SMALL.replace(old, new))


def outcome(call: Any, *args: Any) -> tuple[Any, list[str]]:
    try:
        return call(*args), []
    except UserError as error:
        return None, error.problems


def problems(call: Any, *args: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert all(problem and "\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_a_stage_after_experts_says_that_it_goes_on_with_them(tmp_path: Path) -> None:
    rules = "train: {language: 1e-4, head: frozen, experts: 1e-4, router: 1e-4}, effective_batch: 16"
    experts = "experts: {count: 4, top_k: 2}"
    made, after = f"  - {{name: make, {rules}, {experts}}}\n", f"  - {{name: more, {rules}}}\n"
    text = SMALL[: SMALL.index(STAGE)] + made
    assert len(load(write(tmp_path, text + after.replace("16}", f"16, {experts}}}"))).stages) == 2
    (problem,) = problems(load, write(tmp_path, text + after))
    assert "`stages.more`: stage make before it makes experts, so it needs the same section `experts` to go on" in problem


@pytest.fixture
def small(tmp_path: Path) -> Recipe:
    return load(write(tmp_path, SMALL))


def test_a_small_recipe_leaves_every_knob_to_the_planner(small: Recipe) -> None:
    assert set(small.memory.model_dump().values()) == {"auto"}
    assert small.stages[0].train == {"language": 1e-4, "head": "frozen"}
    assert (small.hardware.nodes, small.data.images_per_sample, small.stages[0].epochs) == (1, 1, 1.0)


def test_the_knobs_are_the_fields_of_a_choice() -> None:
    assert set(KNOBS) == {field.name for field in fields(Choice)} - {"accumulation", "effective_batch", "gpus", "nodes"}


def test_every_key_has_a_help_text() -> None:
    for name, section in SECTIONS.items():
        assert all(field.description for field in section.model_fields.values()), name


def test_a_recipe_cannot_be_changed(small: Recipe) -> None:
    with pytest.raises(ValueError, match="frozen"):
        small.hardware.gpus = 2  # type: ignore[misc]


@pytest.mark.parametrize("name", [PUBLISHED, OURS])
def test_shipped_recipes_load_by_name_and_by_path(name: str, root: Path) -> None:
    recipe = load(name)
    assert recipe == load(root / "recipes" / f"{name}.yaml")
    assert [stage.name for stage in recipe.stages] == ["align", "finetune", "moe"]
    assert [stage.effective_batch for stage in recipe.stages] == [256, 128, 128]
    assert (recipe.hardware.gpu, recipe.hardware.gpus) == ("A100-SXM4-40GB", 8)


def test_every_shipped_recipe_loads(root: Path) -> None:
    shipped = list((root / "recipes").rglob("*.yaml"))
    assert len(shipped) >= 2
    for path in shipped:
        load(path)


def test_the_published_recipe_says_what_the_published_scripts_do() -> None:
    recipe = load(PUBLISHED)
    knobs = {stage.name: memory_of(recipe, stage) for stage in recipe.stages}
    assert {name: memory.micro_batch for name, memory in knobs.items()} == {"align": 32, "finetune": 8, "moe": 8}
    assert {(m.attention, m.loss, m.checkpointing, m.sharding, m.eval_batch) for m in knobs.values()} == {
        ("eager-fp32", "full-shifted", "blocks", "zero2", 4)
    }
    assert not any(data_of(recipe, stage).image_tokens_count for stage in recipe.stages)


def test_a_stage_overrides_what_it_sets_and_nothing_else() -> None:
    recipe = load(PUBLISHED)
    align, finetune = stage_of(recipe, "align"), stage_of(recipe, "finetune")
    assert data_of(recipe, align) == recipe.data.model_copy(update={"max_tokens": 55, "samples": 558128})
    assert memory_of(recipe, align) == recipe.memory.model_copy(update={"micro_batch": 32})
    assert data_of(recipe, finetune) == recipe.data.model_copy(update={"samples": 964000})
    assert memory_of(recipe, finetune) == recipe.memory


def test_a_model_may_be_a_name_or_parts(tmp_path: Path) -> None:
    parts = load(changed(tmp_path, "model: phi-2", "model: {vision: a, projector: linear, language: b}")).model
    assert isinstance(parts, BaseModel)
    assert parts.model_dump() == {
        "vision": "a",
        "projector": "linear",
        "language": "b",
        "vision_feature_layer": -2,
        "vision_feature_select": "patch",
    }


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-4", ".0001", "0.0001"])
def test_every_way_to_write_a_number_is_a_number(tmp_path: Path, text: str) -> None:
    assert load(changed(tmp_path, "1e-4", text)).stages[0].train["language"] == 1e-4


@pytest.mark.parametrize(("written", "read"), [("336", 336), ("[336, 448]", (336, 448))])
def test_image_sizes(tmp_path: Path, written: str, read: object) -> None:
    assert load(changed(tmp_path, "max_tokens: 512", f"max_tokens: 512\n  image_size: {written}")).data.image_size == read


@pytest.mark.parametrize("layers", ["alternate", "first_half", "second_half", "all", [0, 5, 2]])
def test_expert_layers(small: Recipe, layers: object) -> None:
    setting = f"stages.tune.experts={{count: 4, top_k: 2, layers: {layers}}}"
    experts = override(small, [setting]).stages[0].experts
    assert experts is not None
    assert experts.layers == layers


NAME = "name: small"
TOKENS = "max_tokens: 512"
GPUS = "  gpus: 4"
BATCH = "    effective_batch: 16"
RATE = "      language: 1e-4"
HEAD = "      head: frozen"
STAGE = "  - name: tune"
MODEL = "model: phi-2"

# A line of the small recipe, what stands there instead, and what the sentences must say.
BAD = [
    (NAME, "name: small\nnmae: x", "`nmae`", "did you mean `name`"),
    (TOKENS, "max_token: 512", "`data.max_token`", "did you mean `data.max_tokens`"),
    (TOKENS, "max_token: 512", "`data.max_tokens` is missing"),
    (NAME, "micro_batch: 4\nname: small", "`micro_batch`", "did you mean `memory.micro_batch`"),
    (GPUS, "  GPUS: 4", "`hardware.GPUS`", "did you mean `hardware.gpus`"),
    (GPUS, "  zzz: 4", "`hardware.zzz`", "`hardware` has gpu, gpus, nodes and network_gb_s"),
    (BATCH, "    efective_batch: 16", "did you mean `stages.tune.effective_batch`"),
    (BATCH, "    effective_batch: 0", "`stages.tune.effective_batch` must be at least 1, not 0"),
    (BATCH, "    effective_batch: -8", "`stages.tune.effective_batch` must be at least 1, not -8"),
    (BATCH, "    effective_batch: 1.5", "whole number, not 1.5"),
    (BATCH, "    effective_batch: '16'", "whole number, not '16'"),
    (BATCH, "    effective_batch: true", "whole number, not true"),
    (BATCH, "    effective_batch:", "whole number, not empty"),
    (TOKENS, "max_tokens: 0", "`data.max_tokens` must be at least 1"),
    (TOKENS, "max_tokens: 5\n  images_per_sample: -1", "`data.images_per_sample` must be at least 0, not -1"),
    (TOKENS, "max_tokens: 5\n  image_size: 0", "`data.image_size` must be", "not 0"),
    (TOKENS, "max_tokens: 5\n  image_size: [1, 2, 3]", "`data.image_size` must be", "not a list"),
    (TOKENS, "max_tokens: 5\n  image_tokens_count: 1", "`data.image_tokens_count` must be true or false"),
    (GPUS, "  gpus: 0", "`hardware.gpus` must be at least 1"),
    (GPUS, "  gpus: 4\n  nodes: 3", "`hardware`", "4 cannot be spread evenly over nodes 3"),
    (RATE, "      language: 0", "`stages.tune.train.language` must be frozen or a learning rate", "not 0"),
    (RATE, "      language: -1e-4", "learning rate above 0"),
    (RATE, "      language: .nan", "learning rate above 0"),
    (RATE, "      language: .inf", "learning rate above 0"),
    (RATE, "      language: freeze", "learning rate above 0, not 'freeze'"),
    (RATE, "      language: frozen", "`stages.tune.train`: nothing trains in this stage"),
    (RATE, "      langauge: 1e-4", "`stages.tune.train.langauge`", "did you mean `language`"),
    (RATE, "      tower: 1e-4", "`tower` is no part of a model; parts are `vision`"),
    (RATE, "      'language:': 1e-4", "no glob after the colon"),
    (RATE, "      'language:!': 1e-4", "no glob after the colon"),
    (RATE, "      3: 1e-4", "`stages.tune.train[3]` is no key: keys are text"),
    (STAGE, "  - name: a b", "name` must be letters, digits"),
    (STAGE, "  - names: tune", "`stages[0].names`", "`stages[0].name`"),
    (STAGE, "  - name: tune\n    epochs: 0", "`stages.tune.epochs` must be above 0"),
    (STAGE, "  - name: tune\n    data:", "`stages.tune.data` must be a mapping of keys to values, not empty"),
    (STAGE, "  - name: tune\n    data: {max_tokns: 3}", "did you mean `stages.tune.data.max_tokens`"),
    (STAGE, "  - name: tune\n    memory: {loss: half}", "memory.loss` must be auto, full, full-shifted or chunked"),
    (STAGE, "  - name: tune\n    experts: {count: 1, top_k: 2}", "`stages.tune.experts.count` must be a whole number from 2"),
    (STAGE, "  - name: tune\n    experts: {count: [4, 1], top_k: 2}", "one for each layer, not a list with 1"),
    (STAGE, "  - name: tune\n    experts: {count: [4, x], top_k: 2}", "one for each layer, not a list with 'x'"),
    (STAGE, "  - name: tune\n    experts: {count: [], top_k: 2}", "one for each layer, not an empty list"),
    (STAGE, "  - name: tune\n    experts: {count: 4.0, top_k: 2}", "must be a whole number from 2", "not 4.0"),
    (STAGE, "  - name: tune\n    experts: {count: 4, top_k: 5}", "top_k 5 is more than count 4"),
    (STAGE, "  - name: tune\n    experts: {count: [8, 4], top_k: 5}", "top_k 5 is more than the fewest of count, 4"),
    (STAGE, "  - name: tune\n    experts: {count: 4, top_k: 0}", "`stages.tune.experts.top_k` must be at least 1, not 0"),
    (STAGE, "  - name: tune\n    experts: {count: 4, top_k: 1, dispatch: capacity}", "DeepSpeed's over top_k 2, not 1"),
    (STAGE, "  - name: tune\n    experts: {count: 4, top_k: 2, capacity_factor: 2.0}", "`capacity_factor` is for dispatch"),
    (STAGE, "  - name: tune\n    experts: {count: 4, top_k: 2, noise: -1.0}", "`stages.tune.experts.noise` must be at least 0"),
    (
        HEAD,
        "      head: frozen\n      experts: frozen\n      router: 1e-4\n    experts: {count: 4, top_k: 2}",
        "`stages.tune`: the stage makes experts and leaves them frozen",
        "their part is named `experts`, as in `experts: 2e-5`, and that of their routers `router`",
    ),
    (
        HEAD,
        "      head: frozen\n      experts: 1e-4\n      router: frozen\n    experts: {count: 4, top_k: 2}",
        "the stage makes routers, whose weights are new, and leaves the part `router` frozen",
    ),
    (
        HEAD,
        "      head: frozen\n      experts: 1e-4\n      router: 1e-4\n    experts: {count: 4, top_k: 1}",
        "with top_k 1 the router learns from a balance loss alone, and the stage has none",
    ),
    (
        STAGE,
        "  - name: tune\n    experts: {count: 4, top_k: 2, dispatch: capacity}\n    balance: {kind: sequence}",
        "dispatch capacity has DeepSpeed's balance, which is kind micro-batch",
    ),
    (STAGE, "  - name: tune\n    balance: {kind: sequence}", "balance is for experts, and the stage has none"),
    (STAGE, "  - name: tune\n    balance: {kind: sample}", "sequence, group, bias or micro-batch, not 'sample'"),
    (STAGE, "  - name: tune\n    balance: {coefficient: 0.01}", "`stages.tune.balance.kind` is missing"),
    (STAGE, "  - name: tune\n    balance: {kind: group}", "`stages.tune.balance`: kind group needs `group`"),
    (STAGE, "  - name: tune\n    balance: {kind: sequence, group: 4}", "`group` is for kind group, and kind is sequence"),
    (STAGE, "  - name: tune\n    balance: {kind: sequence, bias_rate: 0.1}", "`bias_rate` is for kind bias"),
    (STAGE, "  - name: tune\n    balance: {kind: sequence, group: 0}", "`stages.tune.balance.group` must be at least 1, not 0"),
    (STAGE, "  - name: tune\n    experts: {count: 4, top_k: 2, layers: odd}", "alternate, first_half", "not 'odd'"),
    (STAGE, "  - name: tune\n    experts: {count: 4, top_k: 2, layers: [1, 1]}", "different layer numbers"),
    (STAGE, "  - name: tune\n    experts: {count: 4, top_k: 2, layers: []}", "different layer numbers"),
    (STAGE, "  - name: tune\n    experts: {count: 4, top_k: 2, layers: [-1]}", "layer numbers from 0"),
    (MODEL, "model: 2", "`model` must be a model's name, or its parts vision, projector and language, not 2"),
    (MODEL, "model: [phi-2]", "`model` must be a model's name", "not a list"),
    (MODEL, "model: {vision: a, langage: b, projector: linear}", "did you mean `model.language`"),
    (MODEL, "model: {vision: a, language: b, projector: mlpx_gelu}", "must be linear, identity or mlpNx_gelu"),
    (MODEL, "model: {vision: a, language: b, projector: mlp0x_gelu}", "not 'mlp0x_gelu'"),
    (NAME, 'name: "\\e[31m"', "`name` must be one line of printable text, not '\\x1b[31m'"),
    (NAME, "name: small\nmemory: {micro_batch: 0}", "`memory.micro_batch` must be auto or a whole number from 1"),
    (NAME, "name: small\nmemory: {eval_batch: -4}", "`memory.eval_batch` must be auto, none or a whole number from 1"),
    (NAME, "name: small\nmemory: {attention: flsh}", "eager-fp32, not 'flsh'; did you mean flash?"),
    (NAME, "name: small\nmemory: {expandable_segments: 1}", "must be auto, true or false, not 1"),
    (NAME, "name: small\nmemory: {sharding: null}", "`memory.sharding` must be", "not empty"),
    (NAME, "name: small\nmemory: {accumulation: 2}", "`memory.accumulation` is derived from effective_batch"),
    (NAME, "name: small\nmemory: 3", "`memory` must be a mapping of keys to values, not 3"),
    (NAME, "name: small\nname: large", "`name` is given twice, on lines 2 and 3"),
    (BATCH, "    effective_batch: 16\n    effective_batch: 8", "`stages.tune.effective_batch` is given twice"),
    (RATE, "      language: 1e-4\n      'language': 1e-3", "`stages.tune.train.language` is given twice"),
]


@pytest.mark.parametrize(("old", "new", "words"), [(old, new, words) for old, new, *words in BAD])
def test_bad_input_is_named_with_its_key(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = changed(tmp_path, old, new)
    said = problems(load, path)
    assert all(problem.startswith("recipe.yaml: ") for problem in said)
    for word in words:
        assert any(word in problem for problem in said), said


def test_all_errors_are_said_at_once(tmp_path: Path) -> None:
    text = SMALL.replace("512", "0").replace("gpus: 4", "gpsu: 4").replace("language:", "lang:").replace("small", "s\nname: t")
    said = problems(load, write(tmp_path, text.replace("effective_batch: 16", "effective_batch: x")))
    for key in ("name", "data.max_tokens", "hardware.gpsu", "stages.tune.train.lang", "stages.tune.effective_batch"):
        assert sum(f"`{key}`" in problem for problem in said) == 1, (key, said)
    assert len(said) == 5


def test_stages_need_different_names(tmp_path: Path) -> None:
    stage = SMALL[SMALL.index("  - name: tune") :]
    assert "tune is used more than once" in problems(load, write(tmp_path, SMALL + stage))[0]


@pytest.mark.parametrize("stages", ["[]", "{}", "tune", "[tune]", "[[]]"])
def test_stages_that_are_none(tmp_path: Path, stages: str) -> None:
    text = SMALL[: SMALL.index("stages:")] + f"stages: {stages}\n"
    assert "`stages" in problems(load, write(tmp_path, text))[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "holds a list"),
        (b"just words\n", "holds 'just words'"),
        (b"name: caf\xe9\n", "is not UTF-8 text: byte 9"),
        (b"name: [1, 2\n", "is not valid YAML"),
        (b"name: a: b\n", "is not valid YAML: mapping values are not allowed here, line 1"),
        (b"a: 1\n---\nb: 2\n", "is not valid YAML"),
        (b"name: \x00\n", "is not valid YAML"),
        (b"name: !!python/object/apply:os.getcwd []\n", "is not valid YAML: could not determine a constructor"),
        (b"name: !!int abc\n", "this is no valid int, line 1"),
        (b"name: !!timestamp abc\n", "this is no valid timestamp, line 1"),
        (b"? [a]\n: b\n", "is not valid YAML"),
        (b"name: &a\n  <<: *b\n", "is not valid YAML"),
        (b"[" * 5000, "nested too deeply"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: bytes, says: str) -> None:
    (said,) = problems(load, write(tmp_path, text))
    assert says in said


def test_aliases_cannot_make_a_message_grow(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 30)]
    said = problems(load, write(tmp_path, "\n".join([*lines, "name: *a29", "data: &d {d: *d}"])))
    assert sum(map(len, said)) < 10_000


def test_merge_keys_are_no_keys(tmp_path: Path) -> None:
    said = problems(load, changed(tmp_path, "name: small", "name: small\nmemory: &m {loss: full}\nx: {<<: *m}"))
    assert len(said) == 1
    assert "`x`" in said[0]


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    assert load(write(tmp_path, b"\xef\xbb\xbf" + SMALL.encode())).name == "small"


def test_a_missing_file_suggests_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    assert f"did you mean `{path}`" in problems(load, tmp_path / "recipy.yaml")[0]
    assert f"did you mean `{OURS}`" in problems(load, "moe-lava/phi2-clip336")[0]
    assert "there is no recipe 'zzz'" in problems(load, "zzz")[0]


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    with pytest.raises(UserError, match="is a folder") as caught:
        load(tmp_path)
    assert str(path) in caught.value.hint


def test_a_name_that_no_file_can_have() -> None:
    assert "cannot be read" in problems(load, "x" * 5000)[0]
    for name in ("a\0b", "~nobody-of-that-name/x.yaml"):
        assert "there is no recipe" in problems(load, name)[0]


def test_settings_reach_every_kind_of_key() -> None:
    recipe = override(
        load(PUBLISHED),
        [
            "data.max_tokens=1024",
            "hardware.gpus=4",
            "stages.finetune.effective_batch=64",
            "stages.align.data.images_per_sample=2",
            "stages.moe.experts.count=8",
            "stages.moe.train.language:*.mlp.fc*=1e-5",
            "stages.finetune.memory.loss=chunked",
            "model.vision_feature_select=full",
        ],
    )
    assert (recipe.data.max_tokens, recipe.hardware.gpus) == (1024, 4)
    assert stage_of(recipe, "finetune").effective_batch == 64
    align = data_of(recipe, stage_of(recipe, "align"))
    assert (align.images_per_sample, align.max_tokens) == (2, 55)
    moe = stage_of(recipe, "moe")
    assert moe.experts is not None
    assert moe.experts.count == 8
    assert moe.train["language:*.mlp.fc*"] == 1e-5
    assert [memory_of(recipe, stage).loss for stage in recipe.stages] == ["full-shifted", "chunked", "full-shifted"]


def test_a_knob_alone_is_set_for_every_stage() -> None:
    recipe = override(load(PUBLISHED), ["micro_batch=4", "attention=efficient"])
    assert {memory_of(recipe, stage).micro_batch for stage in recipe.stages} == {4}
    assert {memory_of(recipe, stage).attention for stage in recipe.stages} == {"efficient"}


def test_a_later_setting_wins() -> None:
    settings = ["micro_batch=4", "stages.align.memory.micro_batch=16", "data.max_tokens=9", "data.max_tokens=7"]
    recipe = override(load(PUBLISHED), settings)
    assert [memory_of(recipe, stage).micro_batch for stage in recipe.stages] == [16, 4, 4]
    assert recipe.data.max_tokens == 7


def test_no_setting_changes_nothing() -> None:
    for name in (PUBLISHED, OURS):
        recipe = load(name)
        assert override(recipe, []) == recipe
        assert override(recipe, ["micro_batch=4"]) != recipe
        assert load(name) == recipe


def test_a_setting_may_replace_a_section(small: Recipe) -> None:
    assert override(small, ["model={vision: a, projector: linear, language: b}"]).model != small.model
    assert override(small, ["stages.tune.memory.loss=full", "stages.tune.memory.loss=auto"]).stages[0].memory.loss == "auto"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("micro_batch", "'micro_batch' is not a setting"),
        ("=4", "'=4' is not a setting"),
        ("mirco_batch=4", "did you mean `memory.micro_batch`"),
        ("data.max_tokns=4", "did you mean `data.max_tokens`"),
        ("dat.max_tokens=4", "`dat` is no key of a recipe; did you mean `data`"),
        ("micro_batch=0", "`memory.micro_batch` must be auto or a whole number from 1"),
        ("micro_batch=", "not empty"),
        ("micro_batch=[", "the value of `micro_batch` is not valid YAML"),
        ("data={max_tokens: 1, max_tokens: 2}", "`max_tokens` is given twice"),
        ("name.first=x", "`name` is 'small' and has no keys"),
        ("model.vision=x", "`model` is 'phi-2' and has no keys"),
        ("stages=3", "name a stage and its key, for example stages.tune.effective_batch"),
        ("stages.tune=3", "name a stage and its key"),
        ("stages.tun.effective_batch=3", "there is no stage 'tun'; did you mean `tune`"),
        ("stages.zzz.effective_batch=3", "stages are tune"),
        ("stages.tune.effective_batch=-1", "`stages.tune.effective_batch` must be at least 1"),
        ("stages.tune.train.tower=1e-3", "`tower` is no part of a model"),
        ("hardware.nodes=3", "4 cannot be spread evenly over nodes 3"),
        ("accumulation=2", "`accumulation` is derived"),
        ("memory=", "`memory` must be a mapping of keys to values, not empty"),
    ],
)
def test_bad_settings(small: Recipe, setting: str, says: str) -> None:
    assert says in " ".join(problems(override, small, [setting]))


def test_all_bad_settings_are_said_at_once(small: Recipe) -> None:
    assert len(problems(override, small, ["x", "stages.a.b=1", "name.a=1"])) == 3
    assert len(problems(override, small, ["data.max_tokens=0", "hardware.gpus=0", "loss=x", "memory.x=1"])) == 4


@pytest.mark.parametrize(
    "settings",
    [["memory=", "loss=full"], ["stages.tune.name=5", "stages.x.data.y=1"], ["data=[1]", "data.max_tokens=1"]],
)
def test_settings_after_a_bad_one(small: Recipe, settings: list[str]) -> None:
    recipe, said = outcome(override, small, settings)
    assert (recipe is None) == bool(said)


def test_stage_of_suggests_the_name() -> None:
    recipe = load(PUBLISHED)
    assert stage_of(recipe, "moe") is recipe.stages[2]
    assert "did you mean `finetune`" in problems(stage_of, recipe, "fintune")[0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted({key for section in SECTIONS.values() for key in section.model_fields})


PLACES: list[tuple[str | int, ...]] = [(), ("data",), ("memory",), ("hardware",), ("stages", 0), ("stages", 0, "train")]


@given(st.sampled_from(KEYS), st.sampled_from(PLACES), json_values)
def test_whatever_stands_in_a_file_it_loads_or_is_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, path: tuple[str | int, ...], value: object
) -> None:
    document = yaml.safe_load(SMALL)
    document.setdefault("memory", {})
    target = document
    for step in path:
        target = target[step]
    target[key] = value
    file = write(tmp_path_factory.getbasetemp(), yaml.safe_dump(document, allow_unicode=True))
    recipe, said = outcome(load, file)
    assert isinstance(recipe, Recipe) or said
    assert all(problem.startswith("recipe.yaml") and problem.isprintable() for problem in said)


NAMES = [
    ("vision.layers.0.mlp.fc1.weight", "vision"),
    ("vision.layers.1.mlp.fc1.weight", "vision"),
    ("projector.linear_1.weight", "projector"),
    ("language.layers.0.mlp.experts.fc1", "experts"),
    ("language.layers.0.mlp.router.weight", "router"),
    ("language.layers.1.mlp.fc1.weight", "language"),
    ("language.layers.1.mlp.fc2.weight", "language"),
    ("language.layers.1.self_attn.q_proj.weight", "language"),
    ("lm_head.weight", "head"),
]


def test_cover_gives_every_parameter_its_rate() -> None:
    rates = cover(stage_of(load(PUBLISHED), "moe").train, NAMES)
    assert list(rates) == [name for name, _ in NAMES]
    trained = {name for name, rate in rates.items() if rate is not None}
    assert trained == {name for name, part in NAMES if part in ("projector", "experts", "router")} | {
        "language.layers.1.mlp.fc1.weight",
        "language.layers.1.mlp.fc2.weight",
    }
    assert {rates[name] for name in trained} == {2e-5}


def test_cover_says_everything_that_is_wrong() -> None:
    rules: dict[str, Any] = {
        "vision:*.9.*": 1e-3,
        "projector": 1e-3,
        "experts": "frozen",
        "router": "frozen",
        "language": 1e-3,
        "language:*.fc1.*": 1e-4,
    }
    said = problems(cover, rules, NAMES)
    assert len(said) == 4
    assert "the rule `vision:*.9.*` matches no parameter" in said[0]
    assert "vision (2), projector (1), experts (1), router (1), language (3), head (1)" in said[0]
    towers = "vision.layers.0.mlp.fc1.weight, vision.layers.1.mlp.fc1.weight"
    assert f"no rule covers 2 parameters ({towers}) of part `vision`" in said[1]
    assert "no rule covers 1 parameter (lm_head.weight) of part `head`" in said[2]
    assert "the rules `language` and `language:*.fc1.*` all match 1 parameter (language.layers.1.mlp.fc1.weight)" in said[3]


def test_cover_shows_a_few_examples_only() -> None:
    (said,) = problems(cover, {"head": 1.0}, [("lm_head.weight", "head"), *((f"w{n}", "language") for n in range(1000))])
    assert "no rule covers 1,000 parameters (w0, w1, w2, ...) of part `language`" in said


NAMED = st.dictionaries(st.text("ab.", min_size=1, max_size=4), st.sampled_from(PARTS), min_size=1)


@given(
    NAMED.map(lambda parts: list(parts.items())),
    st.sampled_from(["a*", "*b", "?", "[!a]*", "*"]),
)
def test_a_glob_and_its_complement_cover_a_part_exactly(names: list[tuple[str, str]], glob: str) -> None:
    rules: dict[str, Any] = {f"{part}:{mark}{glob}": 1.0 for part in PARTS for mark in ("", "!")}
    rates, said = outcome(cover, rules, names)
    assert said or set(rates) == {name for name, _ in names}
    assert all("matches no parameter" in problem for problem in said)


def test_a_dispatch_under_a_capacity_is_not_trained() -> None:
    with pytest.raises(UserError, match=r"stages\.moe\.experts\.dispatch capacity is planned and not trained"):
        check_dispatch(load(PUBLISHED).stages)
    check_dispatch(load(OURS).stages)


def test_samples_are_coupled_by_what_looks_at_a_micro_batch() -> None:
    published, ours = (stage_of(load(name), "moe") for name in (PUBLISHED, OURS))
    assert (couples(published), couples(ours)) == (True, False)
    assert not couples(stage_of(load(PUBLISHED), "finetune"))
