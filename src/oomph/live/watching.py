"""What is seen of the device while steps run: how busy it is, and what the process takes of it.

On CUDA the driver says so through NVML (``nvidia-ml-py``), where that is installed; without it these figures are missing. On
the CPU they are the process's own time and resident memory.
"""

from __future__ import annotations

import importlib
import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch

from oomph.units import KIB

_EVERY_SECONDS = 0.05


class Sampler:
    """Calls a function in a thread while its block runs, and keeps what it returns but for None.

    Attributes:
        values: what the function returned.
    """

    def __init__(self, read: Callable[[], int | None]) -> None:
        self.values: list[int] = []
        self._read, self._end = read, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._end.wait(_EVERY_SECONDS):
            self._sample()

    def _sample(self) -> None:
        value = self._read()
        if value is not None:
            self.values.append(value)


class Activity:
    """How busy the device was while the block ran, each as a share; None where nobody says it.

    Attributes:
        utilisation: the time in which a kernel ran; on the CPU the time of the process, over all cores.
        sm_activity: the multiprocessors that were busy, on cards that offer it (NVML's GPM, Hopper and later).
    """

    def __init__(self, device: str) -> None:
        self.utilisation: float | None = None
        self.sm_activity: float | None = None
        self._cuda = device == "cuda"
        self._sampler = Sampler(kernel_percent)

    def __enter__(self) -> Self:
        self._begun, self._used = time.perf_counter(), time.process_time()
        if self._cuda:
            self._before = _gpm_sample()
            self._sampler.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._sampler.__exit__()
            values = self._sampler.values
            self.utilisation = sum(values) / len(values) / 100 if values else None
            self.sm_activity = _sm_share(self._before, _gpm_sample())
            return
        elapsed = time.perf_counter() - self._begun
        self.utilisation = (time.process_time() - self._used) / elapsed / len(os.sched_getaffinity(0))


def driver_version() -> str:
    """The NVIDIA driver's version; empty where nobody says it."""
    with suppress(ImportError, _nvml_error()):
        return str(_nvml().nvmlSystemGetDriverVersion())
    return ""


def card_bytes() -> int | None:
    """What the driver counts of the card's memory as this process's; None where it does not say.

    A process that cannot be told by its number, as in a container, is known as the card's only one.
    """
    with suppress(ImportError, _nvml_error()):
        processes = _nvml().nvmlDeviceGetComputeRunningProcesses(_handle())
        own = [p for p in processes if p.pid == os.getpid()] or (processes if len(processes) == 1 else [])
        return int(own[0].usedGpuMemory) if own and own[0].usedGpuMemory is not None else None
    return None


def bytes_in_use() -> int | None:
    """The process's share of the card, or all that is in use where the driver does not say whose it is."""
    own = card_bytes()
    if own is not None:
        return own
    free, total = torch.cuda.mem_get_info()
    return total - free


def resident_bytes() -> int:
    """The most memory of the machine that this process has held."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * KIB for line in status.splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def _nvml() -> Any:
    """NVML, initialised.

    Raises:
        ImportError: nvidia-ml-py is not installed.
    """
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    return nvml


def _nvml_error() -> type[Exception]:
    try:
        error: type[Exception] = importlib.import_module("pynvml").NVMLError
    except ImportError:
        return ImportError
    return error


def _handle() -> Any:
    return _nvml().nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")


def kernel_percent() -> int | None:
    """The share of the last moments in which a kernel ran on the card, in percent; None where nobody says it."""
    with suppress(ImportError, _nvml_error()):
        return int(_nvml().nvmlDeviceGetUtilizationRates(_handle()).gpu)
    return None


def _gpm_sample() -> Any:
    with suppress(ImportError, _nvml_error()):
        nvml, handle = _nvml(), _handle()
        if nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            sample = nvml.nvmlGpmSampleAlloc()
            nvml.nvmlGpmSampleGet(handle, sample)
            return sample
    return None


def _sm_share(before: Any, after: Any) -> float | None:
    """The share of busy multiprocessors between two samples, which are given back."""
    if before is None or after is None:
        return None
    nvml = _nvml()
    question = nvml.c_nvmlGpmMetricsGet_t()
    question.version, question.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, 1
    question.sample1, question.sample2 = before, after
    question.metrics[0].metricId = nvml.NVML_GPM_METRIC_SM_UTIL
    try:
        nvml.nvmlGpmMetricsGet(question)
        return float(question.metrics[0].value) / 100
    except _nvml_error():
        return None
    finally:
        nvml.nvmlGpmSampleFree(before)
        nvml.nvmlGpmSampleFree(after)
