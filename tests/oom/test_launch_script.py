"""Launch scripts of LLaVA, LLaVA-NeXT and MoE-LLaVA as recipes: what flags mean, and what a shell makes of the text."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from oomph.core.choices import resolve
from oomph.core.devices import find_gpu
from oomph.core.launch.importing import Launch, read_launches
from oomph.core.launch.shell import read_script
from oomph.errors import UserError
from oomph.recipe import data_of, load, stage_of
from oomph.records import Choice

CARD = "A100-SXM4-40GB"
TOWER = "--image_tower openai/clip-vit-large-patch14-336 --image_projector_type mlp2x_gelu --mm_vision_select_layer -2"
# The flags and values of MoE-LLaVA's scripts/v1/phi2/finetune.sh.
FINETUNE = f"""\
#!/bin/bash
NOTES="annotations"   # where they are
PICTURES='pictures'
TRANSFORMERS_OFFLINE=1 deepspeed moellava/train/train_mem.py \\
    --deepspeed ./scripts/zero2.json \\
    --model_name_or_path microsoft/phi-2 \\
    --version phi \\
    --data_path ${{NOTES}}/one.json ${{NOTES}}/two.json \\
    --image_folder ${{PICTURES}} \\
    {TOWER} \\
    --pretrain_mm_mlp_adapter ./checkpoints/pretrain/mm_projector.bin \\
    --mm_use_im_start_end False --mm_use_im_patch_token False \\
    --image_aspect_ratio pad --group_by_modality_length True --bf16 True \\
    --output_dir ./checkpoints/finetune --num_train_epochs 1 \\
    --per_device_train_batch_size 8 --per_device_eval_batch_size 4 --gradient_accumulation_steps 2 \\
    --evaluation_strategy "no" --save_strategy "steps" --save_steps 50000 --save_total_limit 1 \\
    --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" \\
    --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True \\
    --dataloader_num_workers 4 --lazy_preprocess True --report_to tensorboard --cache_dir "./cache_dir"
"""
SHORT = f"deepspeed --num_gpus 4 moellava/train/train_mem.py --model_name_or_path microsoft/phi-2 {TOWER} --bf16 True"


@pytest.fixture
def launches(tmp_path: Path) -> Any:
    """Reads the launches of a text."""

    def read(text: str, **arguments: Any) -> list[Launch]:
        script = tmp_path / "finetune.sh"
        script.write_text(text, encoding="utf-8")
        return read_launches(script, arguments.pop("gpu", CARD), **arguments)

    return read


def chosen(launch: Launch) -> Choice:
    recipe = launch.recipe
    return resolve(recipe.stages[0], recipe, find_gpu(recipe.hardware.gpu))[0]


def test_the_published_script_is_the_published_recipe(launches: Any) -> None:
    (launch,) = launches(FINETUNE)
    recipe, ours = load("moe-llava/phi2-clip336-as-published"), launch.recipe
    stage, own = stage_of(recipe, "finetune"), ours.stages[0]
    assert chosen(launch) == resolve(stage, recipe, find_gpu(recipe.hardware.gpu))[0]
    assert (ours.model, ours.hardware) == (recipe.model, recipe.hardware)
    assert (own.name, own.train, own.effective_batch, own.epochs) == ("finetune", stage.train, 128, 1.0)
    limits = ("max_tokens", "image_tokens_count", "images_per_sample", "image_aspect_ratio")
    theirs = data_of(recipe, stage)
    assert [getattr(data_of(ours, own), key) for key in limits] == [getattr(theirs, key) for key in limits]
    assert not any("not understood" in note for note in launch.notes)
    assert any("8 a machine are assumed" in note for note in launch.notes)


def test_the_pretraining_trains_the_projector_alone(launches: Any) -> None:
    (launch,) = launches(f"{SHORT} --tune_mm_mlp_adapter True --learning_rate 1e-3 --per_device_train_batch_size 32")
    stage = launch.recipe.stages[0]
    assert stage.name == "align"
    assert stage.train == {"vision": "frozen", "projector": 1e-3, "language": "frozen", "head": "frozen"}
    assert stage.effective_batch == 4 * 32


def test_experts(launches: Any) -> None:
    flags = "--moe_enable True --num_experts 4 --top_k_experts 2 --moe_mode sparse --capacity_factor 1.5 --use_residual False"
    (launch,) = launches(f"{SHORT} {flags} --router_aux_loss_coef 0.02 --train_modules fc1 fc2 wg --learning_rate 2e-5")
    stage = launch.recipe.stages[0]
    assert (stage.name, stage.experts.count, stage.experts.top_k, stage.experts.layers) == ("moe", 4, 2, "alternate")
    assert (stage.experts.dispatch, stage.experts.capacity_factor) == ("capacity", 1.5)
    assert stage.balance.coefficient == 0.02
    published = stage_of(load("moe-llava/phi2-clip336-as-published"), "moe")
    assert stage.train == published.train


@pytest.mark.parametrize(
    ("flags", "train"),
    [
        ("--freeze_backbone True", {"vision": "frozen", "projector": 1e-4, "language": "frozen", "head": 1e-4}),
        ("--freeze_mm_mlp_adapter True", {"vision": "frozen", "projector": "frozen", "language": 1e-4, "head": 1e-4}),
        ("--mm_projector_lr 1e-5", {"vision": "frozen", "projector": 1e-5, "language": 1e-4, "head": 1e-4}),
        (
            '--mm_tunable_parts="mm_vision_tower,mm_mlp_adapter" --mm_vision_tower_lr=2e-6',
            {"vision": 2e-6, "projector": 1e-4, "language": "frozen", "head": "frozen"},
        ),
        ("--unfreeze_mm_vision_tower True", {"vision": 1e-4, "projector": 1e-4, "language": 1e-4, "head": 1e-4}),
    ],
)
def test_what_trains(launches: Any, flags: str, train: dict[str, Any]) -> None:
    (launch,) = launches(f"{SHORT} --learning_rate 1e-4 {flags}")
    assert launch.recipe.stages[0].train == train


def test_adapters_and_quantized_weights(launches: Any) -> None:
    text = (
        "python llava/train/train_mem.py --lora_enable True --lora_r 128 --lora_alpha 256 --bits 4 --quant_type nf4"
        " --model_name_or_path lmsys/vicuna-7b-v1.5 --vision_tower openai/clip-vit-large-patch14-336"
        " --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --bf16 True --model_max_length 2048"
    )
    (launch,) = launches(text, gpu="A100-SXM4-80GB")
    stage = launch.recipe.stages[0]
    assert launch.recipe.model == "llava-1.5-7b-hf"
    assert (stage.lora.rank, stage.lora.alpha, stage.lora.dropout) == (128, 256.0, 0.05)
    assert (stage.quantization.kind, stage.quantization.double_quantization) == ("nf4", True)
    assert {part for part, rate in stage.train.items() if rate != "frozen"} == {"projector", "lora"}
    choice = chosen(launch)
    assert (choice.gpus, choice.sharding, choice.attention, choice.precision) == (1, "none", "flash", "bfloat16")
    assert launch.recipe.data.image_tokens_count is True


@pytest.mark.parametrize(
    ("launcher", "gpus", "nodes"),
    [
        ("deepspeed --include localhost:0,1,2 moellava/train/train.py", 3, 1),
        ("deepspeed --num_nodes 2 --num_gpus 8 moellava/train/train.py", 16, 2),
        ("torchrun --nproc_per_node=4 --nnodes=2 moellava/train/train.py", 8, 2),
        ("python -m torch.distributed.run --nproc-per-node 4 moellava/train/train.py", 4, 1),
        ("accelerate launch --num_processes 6 --num_machines 1 moellava/train/train.py", 6, 1),
        ("CUDA_VISIBLE_DEVICES=2,5 deepspeed moellava/train/train.py", 2, 1),
        ("srun --jobid 3 python -u moellava/train/train.py", 1, 1),
        ("deepspeed moellava/train/train.py", 8, 1),
        ("nohup torchrun -m moellava.train.train", 1, 1),
    ],
)
def test_how_many_gpus(launches: Any, launcher: str, gpus: int, nodes: int) -> None:
    (launch,) = launches(f"{launcher} --model_name_or_path microsoft/phi-2 {TOWER} --bf16 True")
    assert (launch.recipe.hardware.gpus, launch.recipe.hardware.nodes) == (gpus, nodes)
    assert launch.recipe.stages[0].effective_batch == 8 * gpus
    (told,) = launches(f"{launcher} --model_name_or_path microsoft/phi-2 {TOWER} --bf16 True", gpus=2)
    assert (told.recipe.hardware.gpus, told.recipe.stages[0].effective_batch) == (2, 16)


def test_the_deepspeed_file_beside_the_script_is_read(launches: Any, tmp_path: Path) -> None:
    config = tmp_path / "scripts" / "mine.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}))
    (launch,) = launches(f"{SHORT} --deepspeed ./scripts/mine.json")
    choice = chosen(launch)
    assert (choice.sharding, choice.optimizer, choice.master_weights) == ("zero3", "adamw-fused", True)
    config.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    (launch,) = launches(f"{SHORT} --deepspeed ./scripts/mine.json")
    assert launch.recipe.memory.optimizer_offload is True


@pytest.mark.parametrize(("name", "sharding"), [("zero3.json", "zero3"), ("x/ds_zero2_no_offload.json", "zero2")])
def test_a_deepspeed_file_that_is_not_here_is_known_by_its_name(launches: Any, name: str, sharding: str) -> None:
    (launch,) = launches(f"{SHORT} --deepspeed {name}")
    assert launch.recipe.memory.sharding == sharding
    assert any("by its name" in note for note in launch.notes)


@pytest.mark.parametrize("content", ["{", "[]", '{"zero_optimization": {"stage": 7}}', '{"zero_optimization": 3}', "\0"])
def test_a_bad_deepspeed_file(launches: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=r"ds\.json"):
        launches(f"{SHORT} --deepspeed ds.json")


@pytest.mark.parametrize(
    ("model", "program", "attention"),
    [
        ("microsoft/phi-2", "moellava/train/train_mem.py", "eager-fp32"),
        ("stabilityai/stablelm-2-1_6b", "moellava/train/train_mem.py", "eager"),
        ("Qwen/Qwen1.5-1.8B", "moellava/train/train_mem.py", "sdpa"),
        ("Qwen/Qwen2.5-7B", "llava/train/train_mem.py", "flash"),
        ("Qwen/Qwen2.5-7B", "llava/train/train_xformers.py", "efficient"),
        ("Qwen/Qwen2.5-7B", "llava/train/train.py", "sdpa"),
        ("Qwen/Qwen2.5-7B", "llava/train/train.py --mm_patch_merge_type flat", "flash"),
        ("Qwen/Qwen2.5-7B", "llava/train/train_mem.py --attn_implementation eager", "eager"),
    ],
)
def test_attention(launches: Any, model: str, program: str, attention: str) -> None:
    tower = TOWER if "moellava" in program else TOWER.replace("image_tower", "vision_tower").replace("image_proj", "mm_proj")
    program, _, more = program.partition(" ")
    (launch,) = launches(f"deepspeed {program} --model_name_or_path {model} {tower} --bf16 True {more}")
    assert launch.recipe.memory.attention == attention


@pytest.mark.parametrize(
    ("flags", "knob", "value"),
    [
        ("--optim paged_adamw_8bit", "optimizer", "adamw-8bit-paged"),
        ("--optim adamw_torch_fused", "optimizer", "adamw-fused"),
        ("--gradient_checkpointing", "checkpointing", "blocks"),
        ("--gradient_checkpointing False", "checkpointing", "none"),
        ("--evaluation_strategy no", "eval_batch", "none"),
        ("--evaluation_strategy steps --per_device_eval_batch_size 3", "eval_batch", 3),
        ("--per-device-train-batch-size=5", "micro_batch", 5),
        ("--use_liger_kernel True", "loss", "chunked"),
    ],
)
def test_knobs(launches: Any, flags: str, knob: str, value: Any) -> None:
    (launch,) = launches(f"{SHORT} {flags}")
    assert getattr(launch.recipe.memory, knob) == value


def test_settings_come_last(launches: Any) -> None:
    (launch,) = launches(SHORT, settings=["micro_batch=2", "data.images_per_sample=3"])
    assert (launch.recipe.memory.micro_batch, launch.recipe.data.images_per_sample) == (2, 3)
    assert chosen(launch).accumulation == 4


def test_tiles_are_images(launches: Any) -> None:
    flags = '--image_aspect_ratio anyres --image_grid_pinpoints "[(336, 672), (672, 672), (1008, 336)]"'
    (launch,) = launches(f"{SHORT} {flags}")
    assert launch.recipe.data.images_per_sample == 5


def test_flags_that_nobody_knows_are_named(launches: Any) -> None:
    (launch,) = launches(f"{SHORT} --frobnicate 3 --warp")
    assert "not understood, and left out: --frobnicate, --warp" in launch.notes


def test_several_trainings_of_a_script_are_stages(launches: Any) -> None:
    text = f"{SHORT} --tune_mm_mlp_adapter True\n{SHORT} --learning_rate 2e-5\n{SHORT} --learning_rate 1e-5\n"
    assert [launch.recipe.stages[0].name for launch in launches(text)] == ["align", "finetune", "finetune-2"]
    (second,) = launches(text, stages=["finetune-2"])
    assert (second.line, second.recipe.stages[0].train["language"]) == (3, 1e-5)
    with pytest.raises(UserError, match="did you mean `finetune"):
        launches(text, stages=["finetun"])


# What a user may have wrong.


def test_models_that_are_not_here_are_named(launches: Any) -> None:
    text = "deepspeed llava/train/train.py --model_name_or_path $1 --vision_tower nobody/tower --bf16 True"
    with pytest.raises(UserError) as caught:
        launches(text)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "model.vision",
        "model.language (the script does not set it)",
    ]
    assert "model.language=phi-2" in caught.value.hint
    parts = ["model.vision=clip-vit-large-patch14-336-vision", "model.language=phi-2"]
    (launch,) = launches(text, settings=parts)
    assert launch.recipe.model.language == "phi-2"


def test_a_checkpoint_of_llavas_own_code_needs_its_base(launches: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava_phi", "hidden_size": 2560}')
    text = SHORT.replace("microsoft/phi-2", str(tmp_path))
    with pytest.raises(UserError, match="checkpoint of LLaVA's own code"):
        launches(text)
    (launch,) = launches(text, settings=["model.language=phi-2"])
    assert launch.recipe.model.language == "phi-2"


def test_flags_of_what_is_off_are_no_riddle(launches: Any) -> None:
    (launch,) = launches(f"{SHORT} --lora_r 8 --quant_type nf4 --num_experts 4 --train_modules fc1 fc2 wg --tf32 True")
    assert not any("not understood" in note for note in launch.notes)


def test_all_wrong_values_are_said_at_once(launches: Any) -> None:
    flags = "--per_device_train_batch_size $BS --learning_rate fast --bf16 perhaps --model_max_length 20.5 --moe_mode all"
    with pytest.raises(UserError) as caught:
        launches(f"{SHORT} {flags} --moe_enable True")
    assert len(caught.value.problems) == 5
    assert any("$BS, which the script does not set" in problem for problem in caught.value.problems)


def test_adapters_on_new_experts_are_refused(launches: Any) -> None:
    with pytest.raises(UserError, match="--moe_enable with --lora_enable"):
        launches(f"{SHORT} --moe_enable True --lora_enable True")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"#!/bin/bash\necho hello\n", "starts no training"),
        (b"\x7fELF\0\0", "is a binary file"),
        ("déjà".encode("latin-1"), "is not UTF-8 text"),
        (b"#" * 300_000, "has more than 256 KiB"),
    ],
)
def test_files_that_are_no_scripts(tmp_path: Path, data: bytes, sentence: str) -> None:
    script = tmp_path / "x.sh"
    script.write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        read_launches(script, CARD)


def test_a_missing_script_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.sh"):
        with pytest.raises(UserError, match="cannot be read"):
            read_launches(path, CARD)


# The shell.


def words(tmp_path: Path, text: str) -> list[list[str]]:
    script = tmp_path / "x.sh"
    script.write_text(text, encoding="utf-8", newline="")
    return [[word.text for word in command.words] for command in read_script(script)]


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("a b\\\n  c # d\ne;f&&g", [["a", "b", "c"], ["e"], ["f"], ["g"]]),
        ("a b \\\r\n  c\r\n", [["a", "b", "c"]]),
        ("X='a b'; run $X \"$X\" '$X'", [["run", "a", "b", "a b", "$X"]]),
        ("X=1\nexport Y=${X}2\nrun $Y ${Z:-9} ${X:-8} ${Q}", [["run", "12", "9", "1", "${Q}"]]),
        ("A=(--x 1 # no\n '--y z')\nrun \"${A[@]}\" ${A[0]}", [["run", "--x", "1", "--y z", "--x"]]),
        ("M=a/b/c\nrun ${M//\\//_} ${M/a/q}", [["run", "a_b_c", "q/b/c"]]),
        ("run `date +%s` $(ls | wc -l) end", [["run", "`date +%s`", "$(ls | wc -l)", "end"]]),
        ("cat <<EOF\nrun this not\nEOF\nrun that", [["cat"], ["run", "that"]]),
        ("if [ -n x ]; then\n  run a\nfi", [["[", "-n", "x", "]"], ["run", "a"]]),
        ("run 'unclosed a", [["run", "unclosed a"]]),
    ],
)
def test_words_are_those_of_a_shell(tmp_path: Path, text: str, commands: list[list[str]]) -> None:
    assert words(tmp_path, text) == commands


def test_a_comment_within_a_command_ends_it(launches: Any) -> None:
    text = SHORT + " \\\n    # --num_train_epochs 3 \\\n    --model_max_length 4096 --lora_enable True\n"
    (launch,) = launches(text)
    assert launch.recipe.data.max_tokens == 512
    assert any("--model_max_length, --lora_enable stand below the command" in note for note in launch.notes)


def test_nothing_is_run(launches: Any, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    text = f"`touch {trap}`\nX=$(touch {trap})\n{SHORT} --output_dir $(touch {trap}) --run_name `touch {trap}`\n"
    launches(text)
    assert not trap.exists()


def test_no_text_breaks_the_reader(tmp_path: Path) -> None:
    generator, script = random.Random(7), tmp_path / "x.sh"
    for _ in range(250):
        letters = list(FINETUNE)
        for _ in range(generator.randint(1, 25)):
            letters[generator.randrange(len(letters))] = generator.choice("\"'`${}()\\\n #;=<>[]/*-:@&|é")
        script.write_text("".join(letters), encoding="utf-8")
        with contextlib.suppress(UserError):
            assert read_launches(script, CARD)


@pytest.mark.parametrize("text", ["A=x\n" + 'A="$A$A"\n' * 60, "${A:-" * 5000, "A=(" * 5000, '"' * 5001, "\\"])
def test_texts_that_grow_or_nest(tmp_path: Path, text: str) -> None:
    script = tmp_path / "x.sh"
    script.write_text(text)
    with pytest.raises(UserError):
        read_launches(script, CARD)
