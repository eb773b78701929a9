"""Meters and what watches a device: the CPU's for real, CUDA's and NVML's with stand-ins for the libraries."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oomph.core.allocator import Allocator, replay
from oomph.core.catalogue import model_folder
from oomph.core.closed_form import ClosedForm
from oomph.core.layout import lay_out
from oomph.core.measuring import Job, Reading
from oomph.errors import UserError
from oomph.live import hardware, measure, watching
from oomph.live.meters import CpuMeter, CudaMeter
from oomph.live.processes import Failed, in_new_process
from oomph.records import Choice, Footprint
from oomph.units import GIB, MIB

# Meters.


class Cuda:
    """``torch.cuda``'s statistics over the simulated allocator."""

    def __init__(self) -> None:
        self.allocator = Allocator()
        self.reserved_peak = 0

    def malloc(self, nbytes: int) -> int:
        address = self.allocator.malloc(nbytes)
        self.reserved_peak = max(self.reserved_peak, self.allocator.reserved)
        return address

    def max_memory_allocated(self) -> int:
        return self.allocator.peak_allocated

    def max_memory_reserved(self) -> int:
        return self.reserved_peak

    def reset_peak_memory_stats(self) -> None:
        self.allocator.reset_peaks()
        self.reserved_peak = self.allocator.reserved


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Puts the simulated allocator's statistics in the place of ``torch.cuda``'s."""
    fake = Cuda()
    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_cuda_meter_finds_the_phases_of_a_replay(cuda: Cuda, toy: ClosedForm, accumulation: int) -> None:
    events = lay_out(toy, Choice(2, accumulation, 2 * accumulation, eval_batch=2), 1024, 0)
    placed: dict[int, int] = {}
    with CudaMeter() as meter:
        for segment in events.segments:
            for _ in range(segment.repeat):
                ends = [(0, ""), *segment.marks, (len(segment.timeline), "")]
                for (start, phase), (end, _) in pairwise(ends):
                    if phase:
                        meter.enter(phase)
                    for entry in segment.timeline[start:end]:
                        if entry >= 0:
                            placed[entry] = cuda.malloc(events.sizes[entry])
                        else:
                            cuda.allocator.free(placed.pop(~entry))
    result = replay(events.sizes, events.segments, Allocator())
    assert meter.footprint() == Footprint(result.peak_allocated, result.peak_reserved, result.phases)


def test_the_cpu_meter_counts_what_is_alive_in_each_phase() -> None:
    gc.collect()
    with CpuMeter() as meter:
        kept = torch.empty(1000, dtype=torch.uint8)
        meter.enter("forward")
        first = torch.empty(300, dtype=torch.uint8)
        del first
        second = torch.empty(200, dtype=torch.uint8)
        meter.enter("backward")
        third = torch.empty(50, dtype=torch.uint8)
        meter.enter("forward")
    peaks = {phase.phase: phase.allocated_peak_bytes for phase in meter.footprint().phases}
    assert peaks == {"load": 1000, "forward": 1300, "backward": 1250}
    assert meter.footprint().allocated_peak_bytes == meter.footprint().reserved_peak_bytes == 1300
    assert kept.numel() + second.numel() + third.numel() == 1250


def test_scratch_of_the_cpu_s_kernels_does_not_count() -> None:
    halves, singles = torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000)
    with CpuMeter() as meter:
        added = halves + singles  # the kernel makes a float32 copy of the halves first
        meter.enter("forward")
        cast = halves.float()
        both = torch.nn.functional.linear(singles.view(10, 100), torch.ones(3, 100), torch.ones(3))
    peaks = {phase.phase: phase.allocated_peak_bytes for phase in meter.footprint().phases}
    made = 10 * 3 * 4 + 3 * 100 * 4 + 3 * 4
    assert peaks == {"load": 4000, "forward": 8000 + made}
    assert added.numel() + cast.numel() + both.numel() == 2030


def test_what_was_there_before_does_not_count() -> None:
    before = torch.empty(5000, dtype=torch.uint8)
    with CpuMeter() as meter:
        own = torch.empty(100, dtype=torch.uint8)
        del before
        del own
    assert meter.footprint().allocated_peak_bytes == 100


# The CPU.


def test_the_cpu_is_as_busy_as_its_process() -> None:
    with watching.Activity("cpu") as idle:
        time.sleep(0.05)
    assert idle.utilisation is not None
    assert 0 <= idle.utilisation < 1
    assert idle.sm_activity is None


def test_resident_memory_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 50 * MIB < watching.resident_bytes() < 64 * GIB
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError))
    assert 50 * MIB < watching.resident_bytes() < 64 * GIB


def test_control_groups_limit_what_is_there(tmp_path: Path) -> None:
    inner = tmp_path / "user" / "session"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("5\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("300\n")
    (inner.parent / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    (tmp_path / "memory.max").write_text("4000\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert list(hardware._control_groups(tmp_path, "0::/user/session\n")) == [(1000, 200), (4000, 700)]
    assert list(hardware._control_groups(tmp_path, "")) == [(4000, 700)]
    assert not list(hardware._control_groups(tmp_path / "nothing", "0::/user\n"))


def test_the_cpu_is_described() -> None:
    seen = hardware.cpu_machine()
    assert (seen.device, seen.capability, seen.driver) == ("cpu", (), "")
    assert 0 < seen.free_bytes <= seen.total_bytes
    assert {"torch", "transformers"} <= seen.versions.keys()


# CUDA and NVML.


class NvmlError(Exception):
    """NVML's own."""


class Nvml:
    """What is used of ``pynvml``. Samples are numbers, and a metric is their difference."""

    NVMLError = NvmlError
    NVML_GPM_METRICS_GET_VERSION, NVML_GPM_METRIC_SM_UTIL = 1, 2

    def __init__(self, processes: list[Any], supported: bool = True) -> None:
        self.processes, self.supported = processes, supported
        self.freed: list[int] = []
        self.samples = iter(range(10, 100, 30))

    def nvmlInit(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        assert handle == "handle"
        return self.processes

    def nvmlDeviceGetUtilizationRates(self, _: str) -> Any:
        return SimpleNamespace(gpu=80)

    def nvmlGpmQueryDeviceSupport(self, _: str) -> Any:
        return SimpleNamespace(isSupportedDevice=int(self.supported))

    def nvmlGpmSampleAlloc(self) -> int:
        return next(self.samples)

    def nvmlGpmSampleGet(self, *_: Any) -> None: ...

    def nvmlGpmSampleFree(self, sample: int) -> None:
        self.freed.append(sample)

    def c_nvmlGpmMetricsGet_t(self) -> Any:
        return SimpleNamespace(metrics=[SimpleNamespace(metricId=0, value=0.0)])

    def nvmlGpmMetricsGet(self, question: Any) -> None:
        assert (question.version, question.numMetrics, question.metrics[0].metricId) == (1, 1, 2)
        question.metrics[0].value = question.sample2 - question.sample1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card as ``torch.cuda`` describes it."""
    facts = SimpleNamespace(name="NVIDIA L4", total_memory=22 * GIB, major=8, minor=9, multi_processor_count=58, uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (18 * GIB, 22 * GIB))
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def process(pid: int, nbytes: int | None) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=nbytes)


@pytest.mark.parametrize(
    ("processes", "found"),
    [
        ([process(os.getpid(), 700), process(1, 900)], 700),
        ([process(1, 900)], 900),
        ([process(1, 900), process(2, 800)], None),
        ([process(os.getpid(), None)], None),
        ([], None),
    ],
)
@pytest.mark.usefixtures("card")
def test_the_driver_says_what_this_process_holds(monkeypatch: pytest.MonkeyPatch, processes: Any, found: int | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(processes))
    assert watching.card_bytes() == found
    assert watching.bytes_in_use() == (4 * GIB if found is None else found)


@pytest.mark.usefixtures("card")
def test_a_card_s_activity_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml([])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with watching.Activity("cuda") as activity:
        time.sleep(0.01)
    assert activity.utilisation == 0.8
    assert activity.sm_activity == pytest.approx(0.3)
    assert nvml.freed == [10, 40]
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([], supported=False))
    with watching.Activity("cuda") as activity:
        pass
    assert (activity.utilisation, activity.sm_activity) == (0.8, None)


@pytest.mark.parametrize("broken", ["missing", "failing"])
@pytest.mark.usefixtures("card")
def test_without_nvml_these_figures_are_missing(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail() -> None:
        raise NvmlError

    nvml: Any = Nvml([process(os.getpid(), 700)])
    nvml.nvmlInit = fail
    monkeypatch.setitem(sys.modules, "pynvml", None if broken == "missing" else nvml)
    with watching.Activity("cuda") as activity:
        pass
    assert (activity.utilisation, activity.sm_activity) == (None, None)
    assert watching.card_bytes() is None
    assert watching.driver_version() == ""
    assert watching.bytes_in_use() == 4 * GIB


@pytest.mark.usefixtures("card")
def test_a_card_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([]))
    seen = hardware.cuda_machine()
    assert (seen.device, seen.name, seen.driver, seen.cuda) == ("cuda", "NVIDIA L4", "580.65", "13.0")
    assert (seen.total_bytes, seen.free_bytes, seen.capability, seen.cores) == (22 * GIB, 19 * GIB, (8, 9), 58)


def test_a_card_that_cannot_be_used_is_the_user_s_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise Failed("RuntimeError: CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "in_new_process", fail)
    with pytest.raises(UserError, match="the CUDA card cannot be used: RuntimeError: CUDA driver") as error:
        hardware.machine()
    assert "CUDA_VISIBLE_DEVICES=" in error.value.hint
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(UserError, match="runs on AMD's cards"):
        hardware.machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.machine().device == "cpu"


# Rungs that fail, and new processes.


@pytest.fixture
def job() -> Any:
    return SimpleNamespace(device="cpu", choice=Choice(1, 1, 1))


def test_out_of_memory_is_a_failure_of_the_rung(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    class Run:
        phase = "backward"

        def __init__(self, _: Any) -> None: ...

        def measured(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 40 GiB")

    monkeypatch.setattr(measure, "_Run", Run)
    assert measure.measure_here(job) == Reading(
        None, failure="out of memory in phase backward: CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    assert gc.isenabled()


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.usefixtures("card")
def test_a_rung_on_a_card_says_what_lies_outside_its_allocator(monkeypatch: pytest.MonkeyPatch, expandable: bool) -> None:
    footprint, settings = Footprint(3 * GIB, 4 * GIB, ()), list[str]()

    class Run:
        def __init__(self, _: Any) -> None: ...

        def measured(self) -> Footprint:
            return footprint

        def timed(self) -> tuple[float, Any]:
            return 0.5, SimpleNamespace(utilisation=0.8, sm_activity=0.3)

    monkeypatch.setattr(measure, "_Run", Run)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 * GIB)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", settings.append)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([process(os.getpid(), 5 * GIB)]))
    choice: Any = SimpleNamespace(device="cuda", choice=Choice(1, 1, 1, expandable_segments=expandable))
    assert measure.measure_here(choice) == Reading(footprint, 5 * GIB, GIB, 0.5, 0.8, 0.3)
    assert settings == [f"expandable_segments:{expandable}"]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert measure.measure_here(choice) == Reading(footprint, 4 * GIB, None, 0.5, 0.8, 0.3)


def test_the_end_of_a_process_is_a_failure_of_the_rung(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    def fail(*_: Any) -> None:
        raise Failed("its process was killed, as the system does when memory runs out")

    monkeypatch.setattr(measure, "in_new_process", fail)
    assert measure.measure_apart(job).failure.startswith("its process was killed")


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("ELSE", "kept")
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    before = environment()
    yield
    assert environment() == before


def environment() -> dict[str, str]:
    """The variables but for pytest's own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


@pytest.mark.usefixtures("_environment")
def test_a_new_process_is_new_and_has_torch_s_defaults() -> None:
    assert in_new_process(os.getpid) != os.getpid()
    assert in_new_process(os.getenv, "PYTORCH_CUDA_ALLOC_CONF") is None
    assert in_new_process(os.getenv, "ELSE") == "kept"


def test_what_goes_wrong_in_a_new_process_is_said() -> None:
    with pytest.raises(Failed, match=r"^ValueError: invalid literal for int\(\) with base 10: 'x'$"):
        in_new_process(int, "x")
    with pytest.raises(UserError, match="no model 'nope' is catalogued") as error:
        in_new_process(model_folder, "nope")
    assert error.value.hint
    with pytest.raises(Failed, match="its process was killed, as the system does when memory runs out"):
        in_new_process(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(Failed, match="its process was ended by signal SIGABRT"):
        in_new_process(signal.raise_signal, signal.SIGABRT)
    with pytest.raises(Failed, match="its process ended with code 7"):
        in_new_process(os._exit, 7)


def test_an_interrupt_ends_the_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_new_process(time.sleep, 600)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for child in multiprocessing.active_children():
        child.join(10)
    assert not multiprocessing.active_children()
