"""The terminal report: whole screens as they must look, and what holds for every plan."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from oomph.records import Choice, FailingRequest, PhasePeak, Plan, Prediction, Request, StagePlan
from oomph.report.lines import ascii_only, bar, clean, cut, kept, shorten, wrap
from oomph.report.text import render
from oomph.report.words import batch, failure, operator, verdict
from oomph.units import GIB, MIB

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
ATTENTION = "model.language_model.layers.1.self_attn"

CHOICE = Choice(4, 2, 16, gpus=2, checkpointing="blocks", attention="eager", loss="chunked", sharding="ddp", eval_batch=4)
OFF = ("vision_checkpointing", "optimizer_offload", "master_weights")
REASONS = {
    **dict.fromkeys(("checkpointing", "precision", "optimizer", "sharding", *OFF), "pinned by memory"),
    **dict.fromkeys(("expandable_segments", "eval_batch"), "pinned by stages.align.memory"),
    "effective_batch": "given by stages.align.effective_batch",
    "gpus": "given by hardware.gpus",
    "micro_batch": "the largest cut that fits: 8 does not fit on T4",
    "attention": "pinned by memory.attention",
    "loss": "the same loss without keeping the logits of all tokens",
    "accumulation": "8 samples of a GPU, 4 at a time, make 2",
    "last_micro_batch": "4 samples",
}
FITS = Prediction(
    fits=True,
    allocated_peak_bytes=8 * GIB,
    reserved_peak_bytes=9 * GIB,
    outside_bytes=2 * GIB,
    usable_bytes=12 * GIB,
    phases=(PhasePeak("load", 4 * GIB, 5 * GIB), PhasePeak("backward", 8 * GIB, 9 * GIB)),
    by_role={"activation": 2 * GIB, "weight": 6 * GIB, "workspace": MIB // 2},
    by_module={f"model.layers.*.part{number}": (9 - number) * GIB // 8 for number in range(8)},
    failing_request=None,
    largest_requests=(
        Request(2 * GIB, (4, 16, 4096, 4096), "bfloat16", "aten._softmax.default", ATTENTION, "forward", "scores"),
        Request(MIB, (524288,), "bfloat16", "load", "lm_head", "load", "weight"),
    ),
    error_bound=0.01,
    leaves_out=("other processes on the card",),
    outside={"context": GIB // 2, "nccl": 3 * GIB // 2},
    evaluation=PhasePeak("evaluate", 5 * GIB, 6 * GIB),
)
FAILING = FailingRequest(
    bytes=4 * GIB,
    shape=(4, 16, 4096, 4096),
    dtype="float32",
    op="aten._softmax_backward_data.default:tmp",
    module=ATTENTION,
    phase="backward",
    role="temporary",
    in_use_bytes=9 * GIB,
    reserved_bytes=10 * GIB,
)
DOES_NOT_FIT = dataclasses.replace(
    FITS,
    fits=False,
    allocated_peak_bytes=13 * GIB,
    reserved_peak_bytes=16 * GIB,
    phases=(PhasePeak("load", 4 * GIB, 5 * GIB), PhasePeak("backward", 13 * GIB, 16 * GIB)),
    failing_request=FAILING,
    leaves_out=("other processes on the card", "communicators beyond the first"),
)


def stage(name: str, prediction: Prediction, choice: Choice = CHOICE) -> StagePlan:
    return StagePlan(name, choice, REASONS, prediction, 20 * 10**6, 3 * 10**9, 4096, 576, "closed form of 5 traces")


def alone(only: StagePlan) -> str:
    return render(Plan("tiny", "T4", 2, (only,), {}))


PLAN = Plan("tiny", "T4", 2, (stage("align", FITS), stage("finetune", DOES_NOT_FIT)), {"torch": "2.13.0"})

SCREEN = """\
tiny on 2 × T4

── align ───────────────────────────────────────────────────────────────────────

  fits: 9.00 GiB of 12.00 GiB reserved at the peak, 3.00 GiB to spare

  batch         micro-batch 4 × accumulation 2 × 2 GPUs = effective batch 16
  sample        4,096 tokens in the longest, 576 of them from images
  parameters    20.0 M of 3.00 B train
  pinned        checkpointing blocks, vision checkpointing none,
                  attention eager, precision bfloat16, optimizer adamw-fused,
                  optimizer offload off, master weights off, sharding ddp,
                  expandable segments off, eval batch 4
  chosen        micro-batch 4: the largest cut that fits: 8 does not fit on T4
                loss chunked: the same loss without keeping the logits of all
                  tokens
  derived       accumulation 2: 8 samples of a GPU, 4 at a time, make 2
                last micro-batch: 4 samples

  memory of one GPU, 100 % being what is usable
     14.00 GiB         ━━━━━━━━━━━━━━━━━━━━  T4
  -   0.50 GiB         ╸                     outside: CUDA context
  -   1.50 GiB         ━━                    outside: NCCL
  =  12.00 GiB  100 %  ━━━━━━━━━━━━━━━━━     usable
      9.00 GiB   75 %  ━━━━━━━━━━━━━         reserved peak
      8.00 GiB   67 %  ━━━━━━━━━━━╸          allocated peak
      3.00 GiB   25 %  ━━━━╸                 free

  by role, at the peak: 8.00 GiB
      6.00 GiB   75 %  ━━━━━━━━━━━━━━━━━━━━  weights
      2.00 GiB   25 %  ━━━━━━╸               activations
       0.5 MiB    0 %                        library workspaces

  by module, at the peak: 5.50 GiB
      1.12 GiB   20 %  ━━━━━━━━━━━━━━━━━━━━  model.layers.*.part0
      1.00 GiB   18 %  ━━━━━━━━━━━━━━━━━━    model.layers.*.part1
      0.88 GiB   16 %  ━━━━━━━━━━━━━━━╸      model.layers.*.part2
      0.75 GiB   14 %  ━━━━━━━━━━━━━╸        model.layers.*.part3
      0.62 GiB   11 %  ━━━━━━━━━━━           model.layers.*.part4
      0.50 GiB    9 %  ━━━━━━━━━             model.layers.*.part5
      0.62 GiB   11 %  ━━━━━━━━━━━           2 others

  allocated peak of each phase
      4.00 GiB   33 %  ━━━━━━━━━━            load        reserved 5.00 GiB
      8.00 GiB   67 %  ━━━━━━━━━━━━━━━━━━━━  backward    reserved 9.00 GiB
      5.00 GiB   42 %  ━━━━━━━━━━━━╸         evaluation  reserved 6.00 GiB

  largest requests in use at the peak
      2.00 GiB  bf16  [4, 16, 4096, 4096]  softmax  …layers.1.self_attn
       1.0 MiB  bf16  [524288]             weights  lm_head

  error bound   1.0 %: the true peak may be up to 81.9 MiB higher
  trace         closed form of 5 traces

── finetune ────────────────────────────────────────────────────────────────────

  does not fit: 4.00 GiB is asked for where 3.00 GiB is free

  The backward pass of recomputed block 1 asks for 4.00 GiB:
  fp32 [4, 16, 4096, 4096] (samples, heads, tokens, tokens), a temporary made by
  softmax backward in model.language_model.layers.1.self_attn. At that moment
  9.00 GiB is in use and 10.00 GiB reserved, of 12.00 GiB usable.

  batch         micro-batch 4 × accumulation 2 × 2 GPUs = effective batch 16
  sample        4,096 tokens in the longest, 576 of them from images
  parameters    20.0 M of 3.00 B train
  pinned        checkpointing blocks, vision checkpointing none,
                  attention eager, precision bfloat16, optimizer adamw-fused,
                  optimizer offload off, master weights off, sharding ddp,
                  expandable segments off, eval batch 4
  chosen        micro-batch 4: the largest cut that fits: 8 does not fit on T4
                loss chunked: the same loss without keeping the logits of all
                  tokens
  derived       accumulation 2: 8 samples of a GPU, 4 at a time, make 2
                last micro-batch: 4 samples

  memory of one GPU, 100 % being what is usable; peaks as if there were room
     14.00 GiB         ━━━━━━━━━━━━━━━━━╸    T4
  -   0.50 GiB         ╸                     outside: CUDA context
  -   1.50 GiB         ━━                    outside: NCCL
  =  12.00 GiB  100 %  ━━━━━━━━━━━━━━━       usable
     16.00 GiB  133 %  ━━━━━━━━━━━━━━━━━━━━  reserved peak
     13.00 GiB  108 %  ━━━━━━━━━━━━━━━━      allocated peak
      1.00 GiB    8 %  ━                     missing at least

  by role, when it fails: 8.00 GiB
      6.00 GiB   75 %  ━━━━━━━━━━━━━━━━━━━━  weights
      2.00 GiB   25 %  ━━━━━━╸               activations
       0.5 MiB    0 %                        library workspaces

  by module, when it fails: 5.50 GiB
      1.12 GiB   20 %  ━━━━━━━━━━━━━━━━━━━━  model.layers.*.part0
      1.00 GiB   18 %  ━━━━━━━━━━━━━━━━━━    model.layers.*.part1
      0.88 GiB   16 %  ━━━━━━━━━━━━━━━╸      model.layers.*.part2
      0.75 GiB   14 %  ━━━━━━━━━━━━━╸        model.layers.*.part3
      0.62 GiB   11 %  ━━━━━━━━━━━           model.layers.*.part4
      0.50 GiB    9 %  ━━━━━━━━━             model.layers.*.part5
      0.62 GiB   11 %  ━━━━━━━━━━━           2 others

  allocated peak of each phase, as if there were room
      4.00 GiB   33 %  ━━━━━━                load        reserved 5.00 GiB
     13.00 GiB  108 %  ━━━━━━━━━━━━━━━━━━━━  backward    reserved 16.00 GiB
      5.00 GiB   42 %  ━━━━━━━╸              evaluation  reserved 6.00 GiB

  largest requests in use when it fails
      2.00 GiB  bf16  [4, 16, 4096, 4096]  softmax  …layers.1.self_attn
       1.0 MiB  bf16  [524288]             weights  lm_head

  error bound   1.0 %: the true peak may be up to 0.13 GiB higher
  not counted   communicators beyond the first
  trace         closed form of 5 traces

── all stages ──────────────────────────────────────────────────────────────────

  not counted   other processes on the card
  traced with   torch 2.13.0

  stage     verdict        allocated    reserved      usable
  align     fits            8.00 GiB    9.00 GiB   12.00 GiB
  finetune  does not fit   13.00 GiB   16.00 GiB   12.00 GiB
"""

names = st.text(min_size=1, max_size=200)
sizes = st.integers(0, 10**15)
parts = st.dictionaries(names, sizes, max_size=12)
shapes = st.lists(st.integers(0, 10**9), max_size=6).map(tuple)
requests = st.builds(Request, sizes, shapes, *[names] * 5)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    failing = draw(st.none() | st.builds(FailingRequest, sizes, shapes, *[names] * 5, sizes, sizes))
    peaks = st.builds(PhasePeak, names, sizes, sizes)
    prediction = Prediction(
        fits=failing is None and draw(st.booleans()),
        allocated_peak_bytes=draw(sizes),
        reserved_peak_bytes=draw(sizes),
        outside_bytes=draw(sizes),
        usable_bytes=draw(sizes),
        phases=tuple(draw(st.lists(peaks, max_size=6))),
        by_role=draw(parts),
        by_module=draw(parts),
        failing_request=failing,
        largest_requests=tuple(draw(st.lists(requests, max_size=6))),
        error_bound=draw(st.floats(0, 10)),
        leaves_out=tuple(draw(st.lists(names, max_size=3))),
        outside=draw(parts),
        evaluation=draw(st.none() | peaks),
    )
    reasons = draw(st.dictionaries(names | st.sampled_from([f.name for f in dataclasses.fields(Choice)]), names, max_size=8))
    one = StagePlan(draw(names), CHOICE, reasons, prediction, draw(sizes), draw(sizes), draw(sizes), draw(sizes), draw(names))
    versions = draw(st.dictionaries(names, names))
    return Plan(draw(names), draw(names), draw(st.integers(1, 10**6)), (one, stage("align", FITS)), versions)


def test_the_screen_is_this_one() -> None:
    assert render(PLAN) == SCREEN


@settings(max_examples=60)
@given(plans(), st.integers(70, 130))
def test_no_line_is_longer_than_the_terminal_and_no_name_steers_it(plan: Plan, width: int) -> None:
    text = render(plan, width)
    for line in text.split("\n"):
        assert cell_len(line) <= width
        assert line.isprintable()


@settings(max_examples=20)
@given(plans(), st.integers(70, 130))
def test_colour_only_echoes_the_words(plan: Plan, width: int) -> None:
    colored = ESCAPE.sub("", render(plan, width, color=True))
    assert "\n".join(line.rstrip() for line in colored.split("\n")) == render(plan, width)


def test_the_verdict_is_green_or_red() -> None:
    lines = render(PLAN, color=True).split("\n")
    (fits,) = [line for line in lines if "  fits: " in line]
    (fails,) = [line for line in lines if "  does not fit: " in line]
    assert fits.startswith("\x1b[1;32m")
    assert fails.startswith("\x1b[1;31m")


def test_below_70_columns_the_screen_stays_at_70() -> None:
    assert render(PLAN, 20) == render(PLAN, 70)
    assert max(map(len, render(PLAN, 20).split("\n"))) == 70


def test_a_terminal_without_unicode_gets_ascii() -> None:
    plain = ascii_only(SCREEN)
    assert plain.isascii()
    assert "tiny on 2 x T4\n\n-- align ---" in plain
    assert "      6.00 GiB   75 %  ====================  weights\n" in plain
    assert "      2.00 GiB   25 %  ======-               activations\n" in plain


def test_the_evaluation_may_be_what_does_not_fit() -> None:
    prediction = dataclasses.replace(FITS, fits=False, evaluation=PhasePeak("evaluate", 13 * GIB, 14 * GIB))
    assert verdict(prediction) == "does not fit: the evaluation reserves 14.00 GiB, and 12.00 GiB is usable"
    assert "      1.00 GiB    8 %  ━╸                    missing at least\n" in alone(stage("s", prediction))


def test_a_margin_below_the_error_bound_is_called_narrow() -> None:
    prediction = dataclasses.replace(FITS, reserved_peak_bytes=12 * GIB - MIB)
    assert verdict(prediction) == (
        "fits, but only just: 12.00 GiB of 12.00 GiB reserved at the peak, 1.0 MiB to spare, "
        "which is less than the error bound"
    )


def test_memory_in_small_pieces_is_called_so() -> None:
    failing = dataclasses.replace(FAILING, in_use_bytes=7 * GIB)
    prediction = dataclasses.replace(DOES_NOT_FIT, failing_request=failing, allocated_peak_bytes=11 * GIB)
    assert verdict(prediction) == "does not fit: 4.00 GiB is asked for, and the 5.00 GiB that is free lies in smaller pieces"
    assert "missing" not in alone(stage("s", prediction))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpointing": "none"}, "The backward pass asks for 4.00 GiB: fp32 [4, 16, 4096, 4096] (samples, heads"),
        ({"phase": "recompute"}, "The recomputed forward pass of block 1 asks for 4.00 GiB: fp32"),
        ({"phase": "forward"}, "The forward pass asks for 4.00 GiB: fp32"),
        ({"shape": (64, 4096, 4096), "role": "scores"}, "(samples × heads, tokens, tokens), attention scores made by"),
        ({"shape": (4, 4096, 32000), "role": "logits"}, "[4, 4096, 32000] (samples, tokens, vocabulary), logits made"),
        ({"shape": (4, 4096, 2560)}, "[4, 4096, 2560] (samples, tokens, features), a temporary"),
        ({"shape": (7, 7)}, "fp32 [7, 7], a temporary made by softmax backward in model."),
        ({"op": "load", "phase": "load", "role": "weight", "module": ""}, "Loading the model asks for 4.00 GiB: fp32"),
        ({"op": "load", "role": "weight", "module": "", "shape": (7,)}, "fp32 [7], a weight. At that moment"),
    ],
)
def test_the_failing_request_is_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    choice = dataclasses.replace(CHOICE, checkpointing=changes.get("checkpointing", "blocks"))
    request = dataclasses.replace(FAILING, **{name: value for name, value in changes.items() if name != "checkpointing"})
    assert sentence in failure(stage("s", DOES_NOT_FIT, choice), request).replace(kept(" "), " ")


@pytest.mark.parametrize(
    ("knobs", "block", "recomputed"),
    [
        ({"checkpointing": "every-2"}, "model.layers.4.mlp", True),
        ({"checkpointing": "every-2"}, "model.layers.5.mlp", False),
        ({"checkpointing": "blocks-offload"}, "model.layers.5.mlp", True),
        ({"checkpointing": "none"}, "model.layers.4.mlp", False),
        ({"checkpointing": "blocks"}, "model.vision_tower.layers.4.mlp", False),
        ({"checkpointing": "none", "vision_checkpointing": "blocks"}, "model.visual.blocks.4.mlp", True),
    ],
)
def test_a_failing_block_is_recomputed_or_not(knobs: dict[str, Any], block: str, recomputed: bool) -> None:
    text = failure(stage("s", DOES_NOT_FIT, dataclasses.replace(CHOICE, **knobs)), dataclasses.replace(FAILING, module=block))
    assert text.startswith("The backward pass of recomputed block" if recomputed else "The backward pass asks")


def test_machines_are_part_of_the_batch() -> None:
    choice = Choice(2, 4, 512, gpus=64, nodes=8)
    assert batch(choice) == "micro-batch 2 × accumulation 4 × 64 GPUs on 8 nodes = effective batch 512"


def test_a_ragged_batch_is_no_product() -> None:
    ragged = dataclasses.replace(CHOICE, effective_batch=15)
    text = alone(stage("s", FITS, ragged))
    assert "micro-batch 4 × accumulation 2 × 2 GPUs, the last ones\n                  smaller, = effective batch 15\n" in text


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("aten._softmax_backward_data.default:tmp", "softmax backward, temporary"),
        ("aten._log_softmax_backward_data.default", "log softmax backward"),
        ("aten.native_layer_norm_backward.default", "layer norm backward"),
        ("aten.add_.Tensor", "add"),
        ("aten.addmm.default", "matrix product"),
        ("aten._to_copy.default", "cast"),
        ("aten._scaled_dot_product_efficient_attention_backward.default:delta", "efficient attention backward, delta"),
        ("transformers.grouped_mm_fallback.default", "grouped mm fallback"),
        ("zero.fp32_master", "ZeRO fp32 master"),
        ("ddp.bucket", "DDP bucket"),
        ("fsdp2.all_gather", "FSDP2 all gather"),
        ("cublas (main thread)", "cuBLAS (main thread)"),
        ("load", "weights"),
        ("", ""),
        ("a.b.c.d", "a.b.c.d"),
        ("aten.\x1b[31m.default", "?[31m"),
    ],
)
def test_operators_have_names_for_people(op: str, words: str) -> None:
    assert operator(op) == words


@given(names, st.integers(2, 80))
def test_a_shortened_name_fits(name: str, width: int) -> None:
    name = clean(name)
    for text in (shorten(name, width), cut(name, width)):
        assert cell_len(text) <= width
        assert text == name or "…" in text


def test_of_a_path_the_last_names_stay() -> None:
    assert shorten(ATTENTION, 39) == ATTENTION
    assert shorten(ATTENTION, 38) == "…language_model.layers.1.self_attn"
    assert shorten(ATTENTION, 10) == "…self_attn"
    assert shorten(ATTENTION, 6) == "…self…"
    assert shorten("lm_head", 6) == "lm_he…"
    assert cut("\u5c42\u5c42", 3) == "\u5c42…"
    assert cut("\u5c42\u5c42", 2) == "…"
    assert shorten("outside the model. A sentence", 12) == "outside the…"


@given(st.lists(names).map(" ".join), st.integers(2, 80))
def test_wrapping_loses_nothing_but_spaces(text: str, width: int) -> None:
    lines = wrap(clean(text), width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == clean(text).replace(" ", "")


@given(st.integers(-(10**15), 10**15), st.integers(0, 10**15), st.integers(1, 60))
def test_a_bar_is_as_long_as_its_share(value: int, scale: int, width: int) -> None:
    blocks = bar(value, scale, width)
    assert len(blocks) <= width
    if scale:
        length = blocks.count("━") + blocks.count("╸") / 2
        assert abs(length - width * min(max(value / scale, 0), 1)) <= 0.25 + 1e-6
