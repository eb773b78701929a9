"""Records of every kind, with numbers made here, and a browser to open their pages with where this machine has one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from oomph.diagnosis_records import Candidate, Cause, Cure, Diagnosis, Frame, OomMessage, OtherProcess
from oomph.records import (
    Card,
    Choice,
    FailingRequest,
    Fit,
    Footprint,
    Limit,
    MeasuredRung,
    MeasuredStage,
    Measurement,
    PhasePeak,
    Plan,
    Prediction,
    Recovery,
    Request,
    RoleBytes,
    Rung,
    Search,
    Speed,
    StagePlan,
    Suggestion,
    Timeline,
    TimelinePart,
)
from oomph.run_records import EvaluationRecord, ExpertLoad, RunStage, RunSummary, StepRecord
from oomph.units import GIB, MIB

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&amp;$x_1$\x00\x1b[2J\ud800"
CHOICE = Choice(4, 2, 16, gpus=2, checkpointing="blocks", attention="eager", loss="chunked", sharding="ddp", eval_batch=4)
SPEED = Speed(2.5, 6.4, 26_000.0, 0.41, 3.5, {"compute": 2.0, "recompute": 0.5})


class Pages(NamedTuple):
    """A record of every kind; `name` stands wherever one may be somebody else's."""

    plan: Plan
    run: RunSummary
    log: tuple[StepRecord | EvaluationRecord, ...]
    measurement: Measurement
    diagnosis: Diagnosis


def prediction(fits: bool, name: str) -> Prediction:
    request = Request(2 * GIB, (4, 16, 4096, 4096), "bfloat16", "aten._softmax.default", f"model.{name}", "forward", "scores")
    failing = FailingRequest(**{**vars(request), "bytes": 5 * GIB}, in_use_bytes=8 * GIB, reserved_bytes=9 * GIB)
    return Prediction(
        fits=fits,
        allocated_peak_bytes=8 * GIB if fits else 13 * GIB,
        reserved_peak_bytes=9 * GIB if fits else 15 * GIB,
        outside_bytes=2 * GIB,
        usable_bytes=12 * GIB,
        phases=(PhasePeak("load", 4 * GIB, 5 * GIB), PhasePeak(name, 8 * GIB, 9 * GIB)),
        by_role={"activation": 2 * GIB, "weight": 6 * GIB - MIB, "workspace": MIB},
        by_module={"model.layers.*.mlp": 3 * GIB, "model.layers.*": GIB, f"model.{name}": 3 * GIB, "a library": GIB},
        failing_request=None if fits else failing,
        largest_requests=(request,),
        error_bound=0.01,
        leaves_out=(name,),
        outside={"context": GIB // 2, name: 3 * GIB // 2},
        evaluation=PhasePeak("evaluate", 5 * GIB, 6 * GIB),
    )


def timeline(fits: bool) -> Timeline:
    weight, activation = [0, 6, 6, 6, 6], [0, 0, 2, 7, 1]
    parts = (
        TimelinePart("load", "load", 0),
        TimelinePart("first step", "forward", 4),
        TimelinePart("later step", "backward", 20),
    )
    lines = RoleBytes("weight", tuple(GIB * n for n in weight)), RoleBytes("activation", tuple(GIB * n for n in activation))
    whole = tuple(GIB * (one + other) for one, other in zip(weight, activation, strict=True))
    peak = 3
    if fits:
        lines = lines[0], RoleBytes("activation", tuple(GIB * min(n, 2) for n in activation))
        whole, peak = tuple(min(nbytes, 8 * GIB) for nbytes in whole), 2
    return Timeline((0, 4, 12, 20, 39), 40, whole, lines, parts, peak, None if fits else 3)


def rung(choice: Choice, speed: float, name: str, *named: str) -> Rung:
    found = prediction(True, name)
    seconds = {"compute": 16 / speed}
    return Rung(16 / speed, speed, 4096 * speed, 0.4, None, seconds, choice, found, {"loss": name}, speed > 5, name, named)


def stage_plan(fits: bool, name: str) -> StagePlan:
    choices = [replace(CHOICE, micro_batch=8 >> n, accumulation=1 << n, attention="sdpa") for n in range(4)]
    ladder = tuple(
        rung(choice, 8.0 - n, name, *(["fastest"] if n == 0 else ["least memory"] if n == 3 else []))
        for n, choice in enumerate(choices)
    )
    return StagePlan(
        name=f"{'align' if fits else 'tune'}{name}",
        choice=CHOICE,
        reasons={"loss": "pinned by memory.loss", "micro_batch": name, "last_micro_batch": "4 samples"},
        prediction=prediction(fits, name),
        trainable_parameters=20 * 10**6,
        total_parameters=3 * 10**9,
        samples_tokens=4096,
        image_tokens=576,
        traced=name,
        speed=SPEED,
        ladder=ladder,
        unpinned=rung(replace(CHOICE, loss="full"), 9.0, name),
        suggestions=(Suggestion("lora", name, GIB, 7 * GIB, True, "arithmetic"),),
        search=Search(40, 20, 10, 10),
        fit=Fit((Card(name, CHOICE, 9 * GIB, 12 * GIB),), (Limit("micro_batch", 7, "samples", name),)),
        made=(name,),
        timeline=timeline(fits),
    )


def step(stage: str, number: int, name: str, **more: Any) -> StepRecord:
    usual: dict[str, Any] = dict(
        stage=stage,
        step=number,
        steps=30,
        epoch=number / 30,
        loss=3.0 / number if number != 4 else None,
        grad_norm=0.5,
        learning_rates={"language": 1e-4 / number, name: 5e-5},
        samples=16,
        tokens=4000,
        label_tokens=900,
        choice=CHOICE,
        split=((16, 300, 16),),
        predicted_peak_bytes=3 * GIB + number,
        measured_peak_bytes=3 * GIB,
        prediction_error_bytes=number,
        limit_bytes=4 * GIB,
        recoveries=(),
        skipped=(),
        shrunk=(),
        seconds={"data": 0.1, "step": 1.9, "between": 0.0},
        decode_seconds=0.2,
        workers=2,
        activity=0.97,
        balance_loss=1.5,
        z_loss=0.25,
    )
    return StepRecord(**{**usual, **more})


def a_run(name: str) -> tuple[RunSummary, tuple[StepRecord | EvaluationRecord, ...]]:
    eight, four = tuple(range(8)), tuple(range(4))
    leaner = replace(CHOICE, attention="sdpa")
    failed = Recovery(
        *(7, 1, "allocator", "backward", name, name, 3 * GIB, 4 * GIB, 3 * GIB + MIB),
        *(CHOICE, leaner, (eight, eight), (eight, four, four)),
    )
    stages = f"align{name}", f"tune{name}"
    lines: list[StepRecord | EvaluationRecord] = []
    for stage in stages:
        for number in range(1, 31):
            lines.append(step(stage, number, name, recoveries=(failed,) if number == 7 else ()))
        lines.append(EvaluationRecord(stage, 30, 0.75, 40, 800, 0.3))
    experts = (ExpertLoad(1, (300, 0, 100, 400), (0, 0, 300, 100)), ExpertLoad(3, (200, 200, 200, 200), (100, 100, 100, 100)))
    summed = tuple(
        RunStage(
            *(stage, 30, 30, 480, 120_000, (name,), (name,), CHOICE, 3.0, 0.1),
            tuple(line for line in lines if line.stage == stage and isinstance(line, EvaluationRecord)),
            *(4 * GIB, 3 * GIB + 30, 3 * GIB, 30 / (3 * GIB), 0.0, (failed,), (name,), (name,)),
            {"data": 3.0, "step": 57.0, "between": 0.0},
            experts if stage == stages[1] else (),
            1.5,
        )
        for stage in stages
    )
    run = RunSummary(name, f"runs/{name}", "cpu", name, summed, name, (name,), {"torch": name}, name)
    return run, tuple(lines)


def a_measurement(name: str) -> Measurement:
    def footprint(allocated: int, reserved: int) -> Footprint:
        return Footprint(allocated, reserved, (PhasePeak("load", GIB, GIB), PhasePeak("backward", allocated, reserved)))

    rungs = [
        MeasuredRung(
            replace(CHOICE, micro_batch=micro),
            footprint(micro * GIB, 2 * micro * GIB),
            10 * MIB,
            footprint(micro * GIB - far, 2 * micro * GIB),
            *(3 * GIB, GIB, 0.25, 8.0, 8192.0, 0.97, 0.42),
        )
        for micro, far in ((1, 0), (2, 512), (4, -3 * MIB), (8, 20 * MIB))
    ]
    rungs.append(MeasuredRung(replace(CHOICE, micro_batch=16), footprint(16 * GIB, 32 * GIB), MIB, None, failure=name))
    stage = MeasuredStage(name, 1024, 1, tuple(rungs), name)
    return Measurement(name, "cuda", name, name, name, (stage,), (name,), {"torch": name}, name)


def a_diagnosis(name: str) -> Diagnosis:
    message = OomMessage(
        kind="cuda allocator",
        text=name,
        line=7,
        rank=3,
        gpu=0,
        requested_bytes=6 * GIB,
        requested_low=6 * GIB - 100,
        requested_high=6 * GIB + 100,
        capacity_bytes=40 * GIB,
        free_bytes=3 * GIB,
        process_bytes=35 * GIB,
        allocated_bytes=32 * GIB,
        unallocated_bytes=GIB,
        others=(OtherProcess(77, 2 * GIB),),
        torch=name,
        frames=(Frame(name, 3, name, name),),
        module=name,
        phase="forward",
        phase_why=name,
        repeats=3,
    )
    return Diagnosis(
        source=name,
        messages=(message, replace(message, rank=None, capacity_bytes=GIB, allocated_bytes=9 * GIB)),
        explained=0,
        candidates=(
            Candidate(name, (name, "tokens"), (8, 2623), "float32", 6 * GIB, (name,), (name,), "likely", 1),
            Candidate("logits", ("tokens",), (9,), "", 6 * GIB, (), (f"{name}2",), "unlikely", 2),
        ),
        causes=(Cause("real need", name, {name: 5 * GIB}, (name,), "certain", 1),),
        event=FailingRequest(6 * GIB, (8, 9), "float32", "aten.mm.default", name, "forward", "scores", 32 * GIB, 33 * GIB),
        alive={"weight": 6 * GIB, "scores": 26 * GIB},
        why_now=(name,),
        cures=(Cure(name, name, True, GIB, 30 * GIB, 31 * GIB, 7.5, True, CHOICE, True), Cure("more", name)),
        notes=(name,),
        recipe=name,
    )


def records(name: str) -> Pages:
    """A record of every kind with a name in every place that has one."""
    plan = Plan(name, name, 2, (stage_plan(True, name), stage_plan(False, name)), {"torch": name})
    run, log = a_run(name)
    return Pages(plan, run, log, a_measurement(name), a_diagnosis(name))


@pytest.fixture(scope="session")
def plain() -> Pages:
    """Records with a harmless name."""
    return records("phi")


@pytest.fixture(scope="session")
def pages(plain: Pages) -> dict[str, str]:
    """The page of a record of every kind."""
    from oomph.report.html.page import page

    return {
        "plan": page(plain.plan),
        "run": page(plain.run, plain.log),
        "measurement": page(plain.measurement),
        "diagnosis": page(plain.diagnosis),
    }


@pytest.fixture(scope="session")
def hostile_pages() -> dict[str, str]:
    """The pages of records in which every name tries to be something else."""
    from oomph.report.html.page import page

    found = records(HOSTILE)
    return {
        "plan": page(found.plan),
        "run": page(found.run, found.log),
        "measurement": page(found.measurement),
        "diagnosis": page(found.diagnosis),
    }


class Browser:
    """Headless Chromium, spoken to over a pipe in its DevTools protocol.

    Args:
        binary: the program.
        folder: for its profile.
    """

    def __init__(self, binary: str, folder: Path) -> None:
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--disable-component-update", "--disable-sync", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        script = f'exec 3<&{to_read} 4>&{to_write}; exec "$@"'  # the protocol's pipes are files 3 and 4
        command = ["bash", "-c", script, "bash", binary, *flags]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=(to_read, to_write), **quiet)  # type: ignore[call-overload]
        os.close(to_read)
        os.close(to_write)
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a call; what else comes meanwhile is kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._in, 1 << 20)
            assert piece, "the browser is gone"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def open(self, file: Path, width: int, dark: bool) -> None:
        """Opens a page at a width, on a light or a dark screen, and waits until it is there."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """What an expression is on the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser; tests that need one are skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    binary = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip("needs Chromium: none in PATH, and CHROMIUM names none")
    found = Browser(binary, tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def numbers() -> Callable[[str], list[str]]:
    """The texts of all cells and figures of a page."""
    from xml.etree import ElementTree

    def texts(page: str) -> list[str]:
        found = ElementTree.fromstring(page.partition("\n")[2])
        return [
            "".join(item.itertext()).strip() for item in found.iter() if item.tag.rpartition("}")[2] in ("td", "dd", "span")
        ]

    return texts
