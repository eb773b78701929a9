"""Plans with a ladder, as a user meets them: one recipe on four kinds of machines, and four models that are hard to plan.

Prints one line for each: what the ladder found, and the seconds it took, with nothing cached and with everything cached,
beside the seconds of a plan without a search on the same cache. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from run import machine

from oomph.units import size

PLAN = [sys.executable, "-m", "oomph", "plan"]
OURS = "moe-llava/phi2-clip336"
RECIPE = """\
name: {model}
model: {model}
data: {{max_tokens: 4096, images_per_sample: {images}}}
hardware: {{gpu: {gpu}, gpus: {gpus}, nodes: {nodes}}}
stages:
  - name: finetune
    train: {train}
    effective_batch: {batch}
"""
TEXT = "{language: 1.0e-5, experts: 1.0e-5, router: 1.0e-5, head: 1.0e-5}"
SEES = "{vision: frozen, projector: 1.0e-5, language: 1.0e-5, experts: 1.0e-5, router: 1.0e-5, head: 1.0e-5}"
DENSE = "{vision: frozen, projector: 1.0e-5, language: 1.0e-5, head: 1.0e-5}"


class Case(NamedTuple):
    """A line of the table: its name, and what `oomph plan` gets."""

    name: str
    arguments: Sequence[str]


def cases(folder: Path) -> list[Case]:
    """The published recipe as we run it, on other hardware, and recipes written into `folder`."""

    def case(model: str, gpu: str, gpus: int, train: str, images: int = 1) -> Case:
        file = folder / f"{model}.yaml"
        nodes = -(-gpus // 8)
        file.write_text(RECIPE.format(model=model, gpu=gpu, gpus=gpus, nodes=nodes, train=train, images=images, batch=2 * gpus))
        return Case(f"{model} on {gpus} × {gpu}", [str(file)])

    stage = [OURS, "--stage", "finetune"]
    return [
        Case("MoE-LLaVA, finetune, on 8 × A100-40GB", stage),
        Case("the same, as published", [f"{OURS}-as-published", "--stage", "finetune"]),
        Case("the same on 1 × T4", [*stage, "--gpu", "T4", "--gpus", "1"]),
        Case("the same on 1 × RTX 4090", [*stage, "--gpu", "RTX 4090", "--gpus", "1"]),
        Case("the same on 64 × H100", [*stage, "--gpu", "H100-SXM5-80GB", "--gpus", "64", "hardware.nodes=8"]),
        case("glm-4.7-flash", "H100-SXM5-80GB", 16, TEXT, images=0),
        case("kimi-k2.5", "H200-SXM-141GB", 256, SEES),
        case("paddleocr-vl-1.5", "RTX-4090", 4, DENSE),
        case("qwen3-vl-30b-a3b-instruct", "H100-SXM5-80GB", 16, SEES),
    ]


def main() -> None:
    """Plans every case and prints the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for line in machine():
        print(line)
    print(f"{'':45}{'cold':>9}{'cached':>9}{'no ladder':>11}  considered  rungs  the fastest that fits")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder)):
            print(line_of(case, Path(folder) / "cache"), flush=True)


def line_of(case: Case, cache: Path) -> str:
    """Plans a case three times."""
    cold, _ = plan(case.arguments, cache)
    cached, stage = plan(case.arguments, cache)
    plain, _ = plan([*case.arguments, "--no-ladder"], cache)
    seconds = f"{cold:7.1f} s{cached:7.1f} s{plain:9.1f} s"
    search = stage["search"]
    return f"{case.name:45}{seconds}  {search['considered']:10,}  {len(stage['ladder']):5}  {_found(stage)}"


def _found(stage: dict[str, Any]) -> str:
    rung = stage["ladder"][0] if stage["ladder"] else stage["nearest"]
    choice, prediction = rung["choice"], rung["prediction"]
    cut = f"{choice['micro_batch']} × {choice['accumulation']}, {choice['sharding']}, checkpointing {choice['checkpointing']}"
    if stage["ladder"]:
        return f"{rung['samples_per_second']:.3g} samples/s, {size(prediction['reserved_peak_bytes'])} reserved: {cut}"
    lacks = prediction["allocated_peak_bytes"] - prediction["usable_bytes"]
    return f"none; the nearest lacks {size(lacks)}: {cut}"


def plan(arguments: Sequence[str], cache: Path) -> tuple[float, dict[str, Any]]:
    """Seconds, and the first stage of the plan.

    Raises:
        RuntimeError: the plan was refused.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    done = subprocess.run([*PLAN, *arguments, "--json"], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode > 1:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    stage: dict[str, Any] = json.loads(done.stdout)["stages"][0]
    return seconds, stage


if __name__ == "__main__":
    main()
