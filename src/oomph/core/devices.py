"""What a GPU offers, and what of it lies outside PyTorch's caching allocator.

Facts come from ``catalogue/gpus.csv``; ``catalogue/GPUS.md`` says where each was read. docs/outside-the-allocator.md
explains the figures. Bytes are ints; rates are per second with 10^9 and 10^12, as vendors quote them.
"""

from __future__ import annotations

import csv
import difflib
import functools
import re
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Literal

from oomph.core.machine import constant
from oomph.errors import UserError
from oomph.records import Record
from oomph.units import MIB

Basis = Literal["this machine", "measured", "derived", "estimated"]

_DTYPES = {
    "bfloat16": "bf16_dense_tflops",
    "float16": "fp16_dense_tflops",
    "tfloat32": "tf32_dense_tflops",
    "float32": "fp32_tflops",
}
_MAKERS = frozenset({"nvidia", "amd", "geforce", "tesla", "instinct"})

# NVIDIA/nccl#964: one communicator and a 4 MB all-reduce take 544 MB on each of two A100 over NVLink, 688 MB on each of
# three or four. NVIDIA/nccl#864: about 1.6 GB. wbfwonderful/Vad-R1#11 (4 x A100 80 GB): 1.43 GiB outside the allocator,
# of which the context takes about 0.45.
_NCCL_BYTES = 1024 * MIB
_NCCL_LOW_PAIR_BYTES = 544 * MIB
_NCCL_LOW_BYTES = 688 * MIB
_NCCL_HIGH_BYTES = 1600 * MIB
_NCCL_SOURCE = "NVIDIA/nccl#964 (544 to 688 MB); NVIDIA/nccl#864 (about 1.6 GB); wbfwonderful/Vad-R1#11 (about 1 GiB)"


@dataclass(frozen=True)
class OutsideLine(Record):
    """One consumer of GPU memory that the caching allocator does not see, in bytes per GPU.

    Attributes:
        name: ``context`` or ``nccl``.
        bytes: the figure to plan with.
        low: the lowest public reading, less its rounding.
        high: the highest public reading, with its rounding.
        basis: ``this machine``: measured there, by ``oomph measure``; ``measured`` on this card; ``derived`` from the numbers
            of an out-of-memory message on this card; ``estimated`` from other cards or other set-ups.
        source: where the readings stand.
    """

    name: str
    bytes: int
    low: int
    high: int
    basis: Basis
    source: str

    @property
    def label(self) -> str:
        """The name, and that it was measured on this machine, where it was."""
        return f"{self.name}, measured on this machine" if self.basis == "this machine" else self.name


@dataclass(frozen=True)
class Outside(Record):
    """Everything on one GPU that lies outside the caching allocator."""

    lines: tuple[OutsideLine, ...]

    @property
    def bytes(self) -> int:
        """The figure to plan with: the sum of the lines."""
        return sum(line.bytes for line in self.lines)

    @property
    def low(self) -> int:
        """The sum of the lines' lowest readings."""
        return sum(line.low for line in self.lines)

    @property
    def high(self) -> int:
        """The sum of the lines' highest readings."""
        return sum(line.high for line in self.lines)


@dataclass(frozen=True)
class Gpu(Record):
    """One GPU.

    Attributes:
        name: the catalogue's name, ``A100-SXM4-40GB`` for instance.
        form: form factor: PCIe, SXM4, OAM ...
        memory_bytes: total memory as CUDA reports it (``torch.cuda.get_device_properties().total_memory``): the lowest
            public reading.
        memory_source: the readings, each with its source.
        nvidia_smi_mib: total as ``nvidia-smi`` prints it; more than CUDA can allocate. None for other makers' cards.
        bandwidth: peak memory bandwidth in bytes per second.
        peak_flops: dense peak rate in FLOP/s by dtype: ``bfloat16``, ``float16``, ``tfloat32``, ``float32``. A dtype
            without tensor cores on the card is missing.
        interconnect: GPU-to-GPU links, empty where there are none but PCIe.
        interconnect_bandwidth: of all links and both directions together, in bytes per second.
        pcie: generation and lanes.
        pcie_bandwidth: both directions together, in bytes per second.
        compute_capability: (major, minor), or None where CUDA's rules do not hold.
        context: what the CUDA context takes, or None where CUDA's rules do not hold.
        uncertain: cells that were not looked up, or where sources differ.
        source: where the other facts stand; the keys are explained in GPUS.md.
    """

    name: str
    form: str
    memory_bytes: int
    memory_source: str
    nvidia_smi_mib: int | None
    bandwidth: float
    peak_flops: dict[str, float]
    interconnect: str
    interconnect_bandwidth: float | None
    pcie: str
    pcie_bandwidth: float
    compute_capability: tuple[int, int] | None
    context: OutsideLine | None
    uncertain: str
    source: str


@functools.cache
def catalogue() -> tuple[Gpu, ...]:
    """Every GPU of the catalogue, in the file's order, those without CUDA included."""
    return tuple(_gpu(row) for row in _rows())


def find_gpu(name: str) -> Gpu:
    """The GPU that ``name`` means: a catalogue name, a name as CUDA prints it, or a short one such as ``h100`` or ``4090``.

    Case, the maker's name and the kind of separator do not matter. A name without a form factor means the SXM card
    where the catalogue has the same model with the same memory as SXM and PCIe.

    Raises:
        UserError: the name is unknown, can mean cards with different memory, or names a card without CUDA.
    """
    words = _words(name)
    found = [gpu for gpu, known in zip(catalogue(), _known_words(), strict=True) if words <= known]
    if not found or not _names_a_model(words):
        raise _unknown(name)
    exact = [gpu for gpu in found if gpu.name.lower() == name.strip().lower()]
    one_model = len({_words(gpu.name) - _words(gpu.form) for gpu in found}) == 1
    sxm = [gpu for gpu in found if one_model and gpu.form.startswith("SXM")]
    chosen = exact or sxm or found
    if len(chosen) > 1:
        names = ", ".join(gpu.name for gpu in found)
        raise UserError(f"GPU `{name}` can mean {len(found)} different cards.", f"Write one of {names}.")
    _require_cuda(chosen[0])
    return chosen[0]


def outside(gpu: Gpu, world_size: int) -> Outside:
    """What lies outside the caching allocator on each GPU of a run with ``world_size`` GPUs.

    The NCCL line is for one communicator with ring and tree collectives, as DDP, FSDP2 and ZeRO use them. More process
    groups and all-to-all (expert parallelism) take more; see docs/outside-the-allocator.md. What was measured on this
    machine's card of that name, with its version of torch, is taken before the catalogue's figures.

    Raises:
        UserError: the card has no CUDA, or the file of what was measured here is damaged.
        ValueError: ``world_size`` is less than 1.
    """
    if world_size < 1:
        raise ValueError(f"a run has 1 GPU or more, not {world_size}")
    _require_cuda(gpu)
    lines = [_seen(gpu, "context") or gpu.context]
    if world_size > 1:
        low = _NCCL_LOW_PAIR_BYTES if world_size == 2 else _NCCL_LOW_BYTES
        estimated = OutsideLine("nccl", _NCCL_BYTES, low, _NCCL_HIGH_BYTES, "estimated", _NCCL_SOURCE)
        lines.append(_seen(gpu, "nccl", world_size) or estimated)
    return Outside(tuple(line for line in lines if line is not None))


@functools.cache
def _torch_version() -> str:
    return metadata.version("torch")


def _seen(gpu: Gpu, name: str, gpus: int = 1) -> OutsideLine | None:
    """What was measured on this machine with this version of torch."""
    seen = constant(gpu.name, _torch_version(), name, gpus)
    if seen is None:
        return None
    return OutsideLine(name, seen.bytes, seen.low, seen.high, "this machine", f"driver {seen.driver}, {seen.date[:10]}")


def usable_bytes(gpu: Gpu, world_size: int) -> int:
    """The bytes that the caching allocator can reserve on each GPU: CUDA's total less what lies outside the allocator.

    Raises:
        UserError: the card has no CUDA.
        ValueError: ``world_size`` is less than 1.
    """
    return gpu.memory_bytes - outside(gpu, world_size).bytes


def cublas_workspace_bytes(compute_capability: tuple[int, int], config: str = "") -> int:
    """The workspace that PyTorch allocates for cuBLAS: one for each thread that multiplies matrices, and stream.

    It is taken from the caching allocator at the thread's first call and kept. A training step has two such threads,
    the main one and autograd's; checkpointed blocks are recomputed in autograd's.

    Source: pytorch ``aten/src/ATen/cuda/CublasHandlePool.cpp``, ``parseChosenWorkspaceSize``: 4096 KiB x 2 + 16 KiB x 8,
    and 32 MiB on Hopper and Blackwell, kept in a map keyed by (handle, stream), where handles belong to threads. Checked
    in the machine code of torch 2.13.0 (majors 9, 10, 12); 2.14.0 adds 11; the file at 26a3905 has 32 MiB for (9, 0) alone.

    Args:
        compute_capability: the card's.
        config: what ``CUBLAS_WORKSPACE_CONFIG`` says: pairs of KiB and a count, as in ``:4096:8``, instead of the default.
    """
    pairs = re.findall(r":(\d+):(\d+)", config)
    if pairs:
        return sum(int(kib) * 1024 * int(count) for kib, count in pairs)
    return 32 * MIB if compute_capability[0] in (9, 10, 12) else 8_519_680


def cublaslt_workspace_bytes(*, unified: bool = True) -> int:
    """The workspace that PyTorch allocates for cuBLASLt on top of cuBLAS's, for each thread and stream, on every card.

    Args:
        unified: whether the two libraries share one workspace: so the wheels do, unless the environment says
            ``TORCH_CUBLASLT_UNIFIED_WORKSPACE=0``. Then nothing is added: cuBLASLt uses the first MiB of the cuBLAS
            workspace, and allocates that one, at full size, where it comes first.

    Source: pytorch ``aten/src/ATen/cuda/CublasHandlePool.cpp``, ``getCUDABlasLtWorkspace`` and
    ``parseCUDABlasLtWorkspaceSize`` (1024 KiB), checked in the machine code of torch 2.13.0 and 2.14.0. The file at 26a3905
    shares only where the environment asks for it.
    """
    return 0 if unified else MIB


@functools.cache
def _rows() -> tuple[dict[str, str], ...]:
    text = resources.files("oomph").joinpath("catalogue", "gpus.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def _gpu(row: dict[str, str]) -> Gpu:
    major, _, minor = row["compute_capability"].partition(".")
    return Gpu(
        name=row["name"],
        form=row["form"],
        memory_bytes=int(row["memory_bytes"]),
        memory_source=row["memory_readings"],
        nvidia_smi_mib=int(row["nvidia_smi_mib"]) if row["nvidia_smi_mib"] else None,
        bandwidth=float(row["bandwidth_gb_s"]) * 1e9,
        peak_flops={dtype: float(row[column]) * 1e12 for dtype, column in _DTYPES.items() if row[column]},
        interconnect=row["interconnect"],
        interconnect_bandwidth=float(row["interconnect_gb_s_bidir"]) * 1e9 if row["interconnect_gb_s_bidir"] else None,
        pcie=row["pcie"],
        pcie_bandwidth=float(row["pcie_gb_s_bidir"]) * 1e9,
        compute_capability=(int(major), int(minor)) if major else None,
        context=_context(row),
        uncertain=row["uncertain"],
        source=row["source"],
    )


def _context(row: dict[str, str]) -> OutsideLine | None:
    if not row["context_bytes"]:
        return None
    return OutsideLine.from_json(
        {
            "name": "context",
            "bytes": int(row["context_bytes"]),
            "low": int(row["context_low_bytes"]),
            "high": int(row["context_high_bytes"]),
            "basis": row["context_basis"],
            "source": row["context_source"],
        }
    )


def _require_cuda(gpu: Gpu) -> None:
    if gpu.compute_capability is None:
        names = ", ".join(other.name for other in catalogue() if other.compute_capability)
        raise UserError(
            f"GPU `{gpu.name}` does not run CUDA, and only CUDA's memory rules are known.", f"Choose one of {names}."
        )


def _words(name: str) -> frozenset[str]:
    """The words of a GPU's name in one spelling: lower case, ``40g`` as ``40gb``, ``rtx4090`` as two words, no maker."""
    spaced = re.sub(r"\b(rtx)(?=\w)", r"\1 ", name.lower())
    words = (re.sub(r"^(\d+)g$", r"\1gb", word) for word in re.findall(r"[a-z0-9]+", spaced))
    return frozenset(words) - _MAKERS


@functools.cache
def _known_words() -> tuple[frozenset[str], ...]:
    """For each GPU of the catalogue, the words that a name of it may hold."""
    forms = ({"sxm"} if gpu.form.startswith("SXM") else set() for gpu in catalogue())
    return tuple(_words(f"{row['name']} {row['form']} {row['words']}") | form for row, form in zip(_rows(), forms, strict=True))


def _names_a_model(words: frozenset[str]) -> bool:
    """Whether there is more to the words than a form factor, a memory size or a product line."""
    lines = {"rtx", "ada", "generation", "hbm3", "sxm", *(gpu.form.lower() for gpu in catalogue())}
    return any(word not in lines and not re.fullmatch(r"\d+gb", word) for word in words)


def _unknown(name: str) -> UserError:
    spellings: dict[str, str] = {}
    for gpu in catalogue():
        spellings[gpu.name.lower()] = gpu.name
        for word in _words(gpu.name):
            if _names_a_model(frozenset({word})):
                spellings.setdefault(word, gpu.name)
    near = difflib.get_close_matches(name.strip().lower(), spellings, n=1)
    guess = f"; did you mean `{spellings[near[0]]}`?" if near else "."
    names = ", ".join(gpu.name for gpu in catalogue() if gpu.compute_capability)
    return UserError(f"GPU `{name}` is not in the catalogue{guess}", f"Write one of {names}.")
