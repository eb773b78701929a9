"""The GPU catalogue is consistent with its own readings, names resolve as written, and what is outside adds up."""

import csv
import re
from pathlib import Path

import pytest

import oomph
from oomph.core.devices import (
    Gpu,
    Outside,
    catalogue,
    cublas_workspace_bytes,
    cublaslt_workspace_bytes,
    find_gpu,
    outside,
    usable_bytes,
)
from oomph.errors import UserError
from oomph.units import GIB, KIB, MIB

FILE = Path(oomph.__file__).parent / "catalogue" / "gpus.csv"
PAGE = Path(__file__).parents[2] / "docs" / "outside-the-allocator.md"
ROWS = list(csv.DictReader(FILE.read_text(encoding="utf-8").splitlines()))
CUDA = [gpu for gpu in catalogue() if gpu.compute_capability]
THREAD = re.compile(r"[\w.-]+/[\w.-]+#\d+")


def ids(gpu):
    return gpu.name


def row(gpu):
    return next(row for row in ROWS if row["name"] == gpu.name)


def lowest(readings):
    """The rule of GPUS.md: a GiB figure stands for the lower edge of its rounding unless an exact reading rounds to it."""
    values = [reading.partition(" @ ")[0] for reading in readings.split(" | ")]
    exact = [int(value.split()[0]) * (MIB if value.endswith("MiB") else 1) for value in values if not value.endswith("GiB")]
    rounded = [value for value in values if value.endswith("GiB") and f"{value}" not in {f"{n / GIB:.2f} GiB" for n in exact}]
    return min(exact + [(2 * round(float(value.split()[0]) * 100) - 1) * GIB // 200 for value in rounded])


def test_every_row_of_the_file_is_a_gpu_with_a_name_of_its_own():
    assert [gpu.name for gpu in catalogue()] == [row["name"] for row in ROWS]
    assert len({gpu.name.lower() for gpu in catalogue()}) == len(catalogue()) >= 22


@pytest.mark.parametrize("gpu", catalogue(), ids=ids)
class TestFacts:
    def test_total_is_the_lowest_reading(self, gpu):
        assert gpu.memory_bytes == lowest(gpu.memory_source)

    def test_every_reading_has_a_source(self, gpu):
        for reading in gpu.memory_source.split(" | "):
            value, _, source = reading.partition(" @ ")
            assert re.fullmatch(r"\d+ B|\d+ MiB|\d+\.\d\d GiB", value)
            assert (
                THREAD.search(source) or "printed line '" in source or source.startswith(("sibling ", "stas00/ml-engineering "))
            )

    def test_a_total_from_a_sibling_says_so(self, gpu):
        basis = row(gpu)["memory_basis"]
        assert basis in {"reading", "sibling"}
        assert (basis == "sibling") == ("@ sibling" in gpu.memory_source)
        assert basis == "reading" or "total from" in gpu.uncertain

    def test_sources_and_links_are_given(self, gpu):
        assert gpu.source
        assert gpu.pcie
        assert (gpu.interconnect == "") == (gpu.interconnect_bandwidth is None)

    def test_rates_are_sane(self, gpu):
        assert 1e11 < gpu.bandwidth < 1e13
        assert 5e12 < gpu.peak_flops["float32"] < 2e14
        assert gpu.peak_flops["float16"] >= gpu.peak_flops["float32"]
        assert all(gpu.peak_flops["float16"] == rate for name, rate in gpu.peak_flops.items() if name == "bfloat16")
        assert gpu.pcie_bandwidth in (32e9, 64e9, 128e9)
        assert (gpu.interconnect_bandwidth or 1e12) > gpu.pcie_bandwidth

    def test_reads_back_from_json(self, gpu):
        assert Gpu.from_json(gpu.to_json()) == gpu


@pytest.mark.parametrize("gpu", CUDA, ids=ids)
class TestCudaCards:
    def test_cuda_has_less_than_nvidia_smi_prints(self, gpu):
        assert 200 * MIB < gpu.nvidia_smi_mib * MIB - gpu.memory_bytes < 1000 * MIB

    def test_tensor_cores_follow_the_architecture(self, gpu):
        assert ("bfloat16" in gpu.peak_flops) == ("tfloat32" in gpu.peak_flops) == (gpu.compute_capability >= (8, 0))

    def test_context_lies_within_its_readings_and_has_a_source(self, gpu):
        line = gpu.context
        assert 0 < line.low <= line.bytes <= line.high < GIB
        assert THREAD.search(line.source) or "printed lines '" in line.source or "stas00/ml-engineering" in line.source
        assert line.basis in {"measured", "derived", "estimated"}

    def test_its_own_name_in_any_case_finds_it(self, gpu):
        for name in (gpu.name, gpu.name.lower(), gpu.name.upper(), f"NVIDIA {gpu.name.replace('-', ' ')}"):
            assert find_gpu(name) is gpu

    @pytest.mark.parametrize("world_size", [1, 2, 8])
    def test_usable_and_outside_add_up_to_the_total(self, gpu, world_size):
        parts = outside(gpu, world_size)
        assert usable_bytes(gpu, world_size) + parts.bytes == gpu.memory_bytes
        assert parts.bytes == sum(line.bytes for line in parts.lines)
        assert parts.low <= parts.bytes <= parts.high
        assert [line.name for line in parts.lines] == (["context"] if world_size == 1 else ["context", "nccl"])
        assert Outside.from_json(parts.to_json()) == parts


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a100-40gb", "A100-SXM4-40GB"),
        ("A100 40G", "A100-SXM4-40GB"),
        ("a100_80gb", "A100-SXM4-80GB"),
        ("a100-pcie-40gb", "A100-PCIe-40GB"),
        ("a100-sxm-80gb", "A100-SXM4-80GB"),
        ("H100", "H100-SXM5-80GB"),
        ("h100 pcie", "H100-PCIe-80GB"),
        ("h200", "H200-SXM-141GB"),
        ("b200", "B200-SXM-180GB"),
        ("v100-32gb", "V100-SXM2-32GB"),
        ("4090", "RTX-4090"),
        ("rtx3090", "RTX-3090"),
        ("5090", "RTX-5090"),
        ("a6000", "RTX-A6000"),
        ("t4", "T4"),
        ("l4", "L4"),
        ("l40s", "L40S"),
        ("a10", "A10"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM5-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("Tesla V100-SXM2-16GB", "V100-SXM2-16GB"),
        ("Tesla T4", "T4"),
    ],
)
def test_short_names_and_names_as_cuda_prints_them(written, meant):
    assert find_gpu(written).name == meant


@pytest.mark.parametrize(
    ("written", "choices"),
    [
        ("A100", {"A100-PCIe-40GB", "A100-SXM4-40GB", "A100-PCIe-80GB", "A100-SXM4-80GB"}),
        ("a100 sxm4", {"A100-SXM4-40GB", "A100-SXM4-80GB"}),
        ("v100", {"V100-PCIe-16GB", "V100-PCIe-32GB", "V100-SXM2-16GB", "V100-SXM2-32GB"}),
    ],
)
def test_a_name_of_several_cards_lists_them(written, choices):
    with pytest.raises(UserError, match=f"`{written}` can mean {len(choices)} different cards") as caught:
        find_gpu(written)
    assert set(re.findall(r"[\w-]+GB", caught.value.hint)) == choices


@pytest.mark.parametrize(
    ("written", "near"), [("L40", "L40S"), ("A10G", "A10"), ("H10O", "H100-PCIe-80GB"), ("RTX-4900", "RTX-4090")]
)
def test_an_unknown_name_offers_a_near_one_and_the_list(written, near):
    with pytest.raises(UserError, match=f"`{written}` is not in the catalogue; did you mean `{near}`?") as caught:
        find_gpu(written)
    assert all(gpu.name in caught.value.hint for gpu in CUDA)


@pytest.mark.parametrize("written", ["", " ", "rtx", "40gb", "sxm", "nvidia", "quadro", "☃"])
def test_a_name_without_a_model_is_unknown(written):
    with pytest.raises(UserError, match="is not in the catalogue"):
        find_gpu(written)


def test_a_card_without_cuda_is_listed_but_refused():
    (card,) = (gpu for gpu in catalogue() if gpu.compute_capability is None)
    assert card.context is None
    for refused in (lambda: find_gpu("mi300x"), lambda: outside(card, 1), lambda: usable_bytes(card, 1)):
        with pytest.raises(UserError, match="`MI300X` does not run CUDA"):
            refused()


def test_a_run_has_a_gpu():
    with pytest.raises(ValueError, match="1 GPU or more"):
        outside(find_gpu("t4"), 0)


def test_the_measured_t4_context():
    (context,) = outside(find_gpu("t4"), 1).lines
    assert (context.bytes, context.basis) == (int(140.875 * MIB), "measured")


@pytest.mark.parametrize(("in_use", "allocated", "cached"), [(72.28, 56.70, 14.15)])
def test_a_public_four_gpu_report_lies_in_the_interval(in_use, allocated, cached):
    """wbfwonderful/Vad-R1#11: 4 x A100 80 GB; in use by the process, allocated, reserved but unallocated, in GiB."""
    expected = outside(find_gpu("a100-80gb"), 4)
    assert expected.low <= (in_use - allocated - cached) * GIB <= expected.high


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), 8_519_680),
        ((8, 0), 8_519_680),
        ((8, 9), 8_519_680),
        ((9, 0), 32 * MIB),
        ((10, 0), 32 * MIB),
        ((12, 0), 32 * MIB),
    ],
)
def test_cublas_workspace(capability, expected):
    assert cublas_workspace_bytes(capability) == expected
    assert expected in (2 * 4096 * KIB + 8 * 16 * KIB, 32 * MIB)


def test_cublaslt_shares_the_cublas_workspace_unless_told_otherwise():
    assert cublaslt_workspace_bytes() == 0
    assert cublaslt_workspace_bytes(unified=False) == 1024 * KIB


def test_the_page_has_the_catalogue_s_numbers():
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and line.split("|")[1].strip() in {gpu.name for gpu in CUDA}
    ]
    assert table == [
        [
            gpu.name,
            f"{gpu.nvidia_smi_mib / KIB:.2f}",
            f"{gpu.memory_bytes / GIB:.2f}",
            f"{gpu.context.bytes / MIB:.0f}",
            f"{gpu.context.low / MIB:.0f} to {gpu.context.high / MIB:.0f}",
            gpu.context.basis,
        ]
        for gpu in CUDA
    ]
