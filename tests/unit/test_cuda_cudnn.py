"""cuDNN: when torch 2.13 takes its attention, and workspaces against what cuDNN 9.20 answered for cards' properties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from oomph.core.cudnn_sizes import convolution_copies, cudnn_attention_backward, cudnn_attention_forward
from oomph.core.devices import cublas_workspace_bytes
from oomph.live.cuda_rules import CudaFunctions, CudaRules, Device, Program
from oomph.live.cuda_rules.attention import Backend, Call, select_backend
from oomph.units import MIB

aten = torch.ops.aten
half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
V100, T4, A100, A40, L40 = Device((7, 0)), Device((7, 5)), Device((8, 0)), Device((8, 6)), Device((8, 9))
H100, B200, B300, RTX_PRO = Device((9, 0)), Device((10, 0)), Device((10, 3)), Device((12, 0))
EVERY = (V100, T4, A100, A40, L40, H100, B200, B300, RTX_PRO)


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def heads(count: int = 8, tokens: int = 100, size: int = 64, dtype: torch.dtype = bf16, batch: int = 2) -> torch.Tensor:
    return torch.empty(batch, tokens, count, size, dtype=dtype).transpose(1, 2).requires_grad_()


# --- the choice of attention by architecture ---------------------------------------------------------------------------


def chosen(call: Call) -> list[Backend]:
    return [select_backend(device, call) for device in EVERY]


def test_the_choice_by_architecture() -> None:
    """sm_70, 75, 80, 86, 89, 90, 100, 103, 120; ``select_sdp_backend`` in the machine code of torch 2.13.0."""
    plain, mask = heads(), torch.empty(2, 1, 100, 100, dtype=torch.bool)
    assert chosen(Call(plain, plain, plain)) == ["math"] * 2 + ["flash"] * 3 + ["cudnn"] * 3 + ["flash"]
    assert chosen(Call(plain, plain, plain, mask)) == ["math"] * 2 + ["efficient"] * 3 + ["cudnn"] * 3 + ["efficient"]
    sixteen = heads(dtype=half)
    assert chosen(Call(sixteen, sixteen, sixteen)) == ["efficient"] * 2 + ["flash"] * 3 + ["cudnn"] * 3 + ["flash"]
    single = heads(dtype=fp32)
    assert chosen(Call(single, single, single)) == ["efficient"] * 9
    few = heads(2)
    assert chosen(Call(plain, few, few, mask, grouped=True)) == ["math"] * 5 + ["cudnn"] * 3 + ["math"]


@pytest.mark.parametrize(("dropout", "backend"), [(0.0, "cudnn"), (0.1, "flash"), (0.125, "cudnn"), (0.0625, "cudnn")])
def test_cudnn_draws_dropout_in_sixteenths(dropout: float, backend: Backend) -> None:
    query = heads()
    assert select_backend(H100, Call(query, query, query, None, dropout)) == backend


def test_cudnn_takes_no_more_than_65535_samples_or_heads() -> None:
    many = heads(1, 16, 8, batch=65536)
    assert select_backend(H100, Call(many, many, many)) == "flash"


def test_efficient_attention_needs_aligned_starts_from_sm_80_on() -> None:
    packed = torch.empty(2 * 100 * 8 * 64 + 8, dtype=fp32)
    shifted, aligned = (packed[start : start + 2 * 100 * 8 * 64].view(2, 100, 8, 64).transpose(1, 2) for start in (2, 4))
    assert select_backend(A100, Call(shifted, shifted, shifted)) == "math"
    assert select_backend(A100, Call(aligned, aligned, aligned)) == "efficient"
    assert select_backend(T4, Call(shifted, shifted, shifted)) == "efficient"


# --- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sm", "shape", "answer"),
    [
        (90, (2, 16, 16, 1024, 1024, 64, 64), 8519936),
        (90, (2, 16, 4, 1000, 1000, 128, 128), 32896256),
        (90, (2, 16, 16, 512, 512, 192, 128), 12648448 + 256),
        (90, (2, 8, 4, 512, 512, 256, 256), 8421376 + 8388864),
        (90, (1, 8, 8, 128, 128, 64, 64), 266240 + 256),
        (100, (2, 16, 16, 1024, 1024, 128, 128), 16908288),
        (100, (2, 16, 4, 1000, 1000, 128, 128), 32896128),
        (100, (1, 8, 8, 128, 128, 64, 64), 266240 + 262272),
        (100, (1, 8, 8, 129, 129, 64, 64), 268320),
        (100, (1, 8, 8, 77, 77, 64, 64), 160160 + 163968),
        (100, (2, 16, 2, 100, 100, 96, 96), 1241600 + 2506880),
        (100, (2, 32, 32, 128, 128, 192, 128), 6324224),
        (103, (8, 32, 8, 100, 100, 128, 128), 13209600 + 13107200 + 13631616),
    ],
)
def test_attention_backward_is_what_cudnn_answers(sm: int, shape: tuple[int, ...], answer: int) -> None:
    assert cudnn_attention_backward(sm, *shape) == answer
    assert cudnn_attention_forward(sm) == (256 if sm == 90 else 0)


def programs(device: Device, step: Any) -> dict[str, Program | None]:
    """The program of each operator of a step, forward and backward."""
    rules, found = CudaRules(device, "sdpa"), {}

    class Programs(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            found[func._schema.name.removeprefix("aten::")] = rules.program(func, args, kwargs or {}, out)
            return out

    with CudaFunctions(rules), Programs():
        out = step()
        out.backward(torch.empty_like(out))
    return found


def test_attention_takes_its_workspace_after_its_outputs() -> None:
    query, key = heads(8, 200), heads(2, 200)
    found = programs(H100, lambda: F.scaled_dot_product_attention(query, key, key, enable_gqa=True))
    forward, backward = (found[f"_scaled_dot_product_cudnn_attention{end}"] for end in ("", "_backward"))
    rows = 2 * 8 * 200
    assert [extra.bytes for extra in forward.after] == [256]
    assert [extra.bytes for extra in backward.after] == [rows * 65 * 4 + rows * 64 * 2 * 2 + 256]
    assert forward.before == backward.before == ()
    assert CudaRules(H100, "sdpa").classified(aten._scaled_dot_product_cudnn_attention_backward.default)


# --- convolutions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "pixels", "filters", "patch", "itemsize", "answer"),
    [
        (1, 336, 1024, 14, 2, 6197264),
        (8, 336, 1024, 14, 2, 27099152),
        (32, 384, 1152, 14, 2, 132857872),
        (5, 224, 768, 16, 2, 8665104),
        (8, 224, 768, 16, 4, 14385168),
        (8, 336, 1024, 14, 4, 36536336),
    ],
)
def test_patch_embeddings_on_sm_80_are_what_cudnn_answers(
    images: int, pixels: int, filters: int, patch: int, itemsize: int, answer: int
) -> None:
    places = (pixels // patch) ** 2
    assert convolution_copies(images, 3, pixels**2, filters, patch**2, places, itemsize) == answer


@pytest.mark.parametrize(
    ("images", "taps", "filters", "answer"),
    [(100, 2 * 14 * 14, 1280, 8655376), (4096, 2 * 16 * 16, 1152, 42991632), (4096, 14 * 14, 1152, 16457744)],
)
def test_convolutions_of_single_patches_do_not_copy_their_output(images: int, taps: int, filters: int, answer: int) -> None:
    assert convolution_copies(images, 3, taps, filters, taps, 1, 2) == answer


def patches(device: Device, depth: int = 0) -> list[int]:
    image, weight = torch.empty(4, 3, 28, 28, dtype=bf16), torch.empty(8, 3, 14, 14, dtype=bf16, requires_grad=True)
    if depth:
        image = torch.empty(4, 3, depth, 28, 28, dtype=bf16)
        weight = torch.empty(8, 3, depth, 14, 14, dtype=bf16, requires_grad=True)
    convolve = F.conv3d if depth else F.conv2d
    found = programs(device, lambda: convolve(image, weight, stride=(depth, 14, 14)[-2 - bool(depth) :]))
    return [sum(e.bytes for e in p.after) if p else 0 for p in (found["convolution"], found["convolution_backward"])]


def test_convolutions_copy_their_tensors_with_channels_last() -> None:
    planes = 4 * 28 * 28 * 16 + 8 * 14 * 14 * 16 + 4 * 8 * 4 * 2 + 16
    assert patches(A100) == patches(L40) == [planes, planes]
    assert patches(T4) == [0, 0]
    volumes = 2 * (4 * 28 * 28 * 16 + 8 * 14 * 14 * 16) + 4 * 8 * 4 * 2 + 16
    assert patches(T4, depth=2) == patches(H100, depth=2) == [volumes, volumes]


def test_other_convolutions_are_left_alone() -> None:
    image, weight = torch.empty(4, 8, 28, 28, dtype=bf16), torch.empty(8, 1, 3, 3, dtype=bf16, requires_grad=True)
    found = programs(A100, lambda: F.conv2d(image, weight, groups=8))
    assert found["convolution"] is found["convolution_backward"] is None
    last = image[:, :3].contiguous(memory_format=torch.channels_last)
    assert programs(A100, lambda: F.conv2d(last, weight.expand(8, 3, 3, 3)))["convolution"] is None


def test_what_of_cudnns_choice_is_settled() -> None:
    forward, backward = aten.convolution.default, aten.convolution_backward.default
    settled = [device for device in EVERY if CudaRules(device, "sdpa").classified(forward)]
    assert settled == [A100, H100, B200, B300], "elsewhere cuDNN asked for more than copies at times"
    assert not any(CudaRules(device, "sdpa").classified(backward) for device in EVERY)


# --- cuBLAS ------------------------------------------------------------------------------------------------------------


def test_cublas_workspace_by_architecture() -> None:
    large = {H100, B200, B300, RTX_PRO}
    for device in EVERY:
        assert cublas_workspace_bytes(device.capability) == (32 * MIB if device in large else 8_519_680)


@pytest.mark.parametrize(("config", "size"), [(":4096:8", 32 * MIB), (":16:8", 128 * 1024), (":4096:2:16:8", 8_519_680)])
def test_cublas_workspace_can_be_configured(config: str, size: int) -> None:
    device = Device((9, 0), cublas_workspace_config=config)
    call = (torch.empty(2, 4), torch.empty(4, 8))
    assert CudaRules(device, "sdpa").workspaces(aten.mm.default, call, {}) == (("cublas", size),)
    assert cublas_workspace_bytes((8, 0), config) == size
