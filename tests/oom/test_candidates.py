"""Candidates, causes and cures: every candidate has the size, words in the text decide, traps are seen, arithmetic adds up."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomph.core.oom.candidates import says_nothing
from oomph.core.oom.explain import explain
from oomph.core.oom.families import families
from oomph.core.oom.guesses import Size, guesses
from oomph.core.oom.priors import Priors, length_in_words
from oomph.diagnosis_records import Diagnosis
from oomph.units import GIB, MIB

BYTES = {"float32": 4.0, "bfloat16 or float16": 2.0, "bool": 1.0, "4 bits (nf4)": 0.5}
ORDER = ("certain", "likely", "possible", "unlikely")
CALL = '  File "/x/site-packages/{file}", line 7, in {function}\n    {code}\n'


def asked(text: str, before: str = "", **numbers: str) -> Diagnosis:
    """The diagnosis of a message of PyTorch 2.5 that asks for a size."""
    given = {"capacity": "79.25 GiB", "free": "1.00 GiB", "allocated": "77.00 GiB", "unallocated": "0.50 GiB", **numbers}
    message = (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {text}. GPU 0 has a total capacity of "
        f"{given['capacity']} of which {given['free']} is free. {given.get('more', '')}Of the allocated memory "
        f"{given['allocated']} is allocated by PyTorch, and {given['unallocated']} is reserved by PyTorch but unallocated."
    )
    return explain(f"{before}{message}", "log")


def trace(*frames: tuple[str, str, str]) -> str:
    """A traceback of (file, function, code)."""
    lines = [CALL.format(file=file, function=function, code=code) for file, function, code in frames]
    return "Traceback (most recent call last):\n" + "".join(lines)


@settings(max_examples=8, deadline=None)
@given(st.integers(25 * MIB, 60 * GIB))
def test_every_candidate_has_the_size(nbytes: int) -> None:
    segment = -(-nbytes // (2 * MIB)) * 2 * MIB
    diagnosis = asked(f"{segment / GIB:.2f} GiB" if segment > GIB else f"{segment / MIB:.2f} MiB")
    message = diagnosis.message
    assert message.requested_low is not None
    assert message.requested_high is not None
    assert message.requested_low <= nbytes <= message.requested_high
    assert [candidate.rank for candidate in diagnosis.candidates] == list(range(1, len(diagnosis.candidates) + 1))
    certainties = [ORDER.index(candidate.certainty) for candidate in diagnosis.candidates]
    assert certainties == sorted(certainties)
    for candidate in diagnosis.candidates:
        assert candidate.bytes == math.prod(candidate.shape) * BYTES[candidate.dtype]
        assert message.requested_low <= candidate.bytes <= message.requested_high
        assert len(candidate.symbols) == len(candidate.shape)


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        ((8, 32, 2623, 2623), 4, "modeling_phi.py softmax"),
        ((4, 32, 3198, 3198), 4, "modeling_llama.py softmax"),
        ((2, 16, 4096, 4096), 4, "modeling_gemma.py softmax"),
        ((2, 4096, 128256), 4, "modeling_llama.py cross_entropy llama-3.1-8b"),
        ((4, 2048, 152064), 4, "modeling_qwen2.py cross_entropy qwen2.5-7b"),
        ((1, 8192, 262208), 2, "modeling_gemma3.py lm_head gemma-3-12b"),
        ((16, 1024, 50257), 4, "modeling_gpt2.py cross_entropy"),
    ],
)
def test_a_shape_is_found_again_from_its_size_and_its_traceback(shape: tuple[int, ...], dtype: int, text: str) -> None:
    file, code, *words = text.split(" ")
    segment = -(-math.prod(shape) * dtype // (2 * MIB)) * 2 * MIB
    stack = trace((f"transformers/models/x/{file}", "forward", f"y = {code}(x)"), ("torch/nn/functional.py", code, "ret"))
    size = f"{segment / GIB:.2f} GiB" if segment > GIB else f"{segment / MIB:.2f} MiB"
    diagnosis = asked(size, " ".join(words) + "\n" + stack)
    first = diagnosis.candidates[0]
    assert first.shape[-1] == shape[-1] or len(shape) == 4  # twice the length with a quarter of the samples is as large
    assert (first.bytes, len(first.shape)) == (math.prod(shape) * dtype, len(shape))


def test_words_in_the_traceback_decide() -> None:
    """4.64 GiB is logits of a Qwen and a weight of another, according to where it failed."""
    loss = trace(("transformers/loss/loss_utils.py", "ForCausalLMLoss", "loss = cross_entropy(logits)"))
    load = trace(
        ("transformers/modeling_utils.py", "from_pretrained", "x"), ("torch/nn/modules/module.py", "_apply", "fn(param)")
    )
    step = trace(("torch/optim/adamw.py", "_init_group", "state['exp_avg'] = torch.zeros_like(p)"))
    assert asked("4.64 GiB", loss).candidates[0].what == "logits"
    assert asked("4.64 GiB", load).candidates[0].what == "embedding or output head"
    assert asked("4.64 GiB", step).candidates[0].what == "embedding or output head"
    assert asked("4.64 GiB", step).message.phase == "optimizer"


def test_expert_dispatch_is_found_in_deepspeeds_gating() -> None:
    stack = trace(("deepspeed/moe/sharded_moe.py", "top2gating", 'combine1_sec = einsum("se,sc->sec", gates1, locations1_sc)'))
    first = asked("6.56 GiB", stack).candidates[0]
    assert first.what == "expert dispatch"
    tokens, experts, capacity = first.shape
    assert capacity == math.ceil(tokens / experts * round(capacity * experts / tokens, 2))


def test_the_batch_and_the_length_that_the_text_gives_count() -> None:
    flags = "--per_device_train_batch_size 6 --model_max_length 3000 --model_name_or_path lmsys/vicuna-7b-v1.5\n"
    segment = -(-6 * 32 * 3575 * 3575 * 4 // (2 * MIB)) * 2 * MIB
    first = asked(f"{segment / GIB:.2f} GiB", flags).candidates[0]
    assert first.shape == (6, 32, 3575, 3575)
    assert any("in a text of 3,000" in reason for reason in first.why)


def test_a_sub_group_of_zero_3_is_no_tensor_of_the_models() -> None:
    first = asked("3.73 GiB").candidates[0]
    assert (first.shape, first.symbols) == ((1_000_000_000,), ("elements",))
    assert "sub_group_size" in asked("3.73 GiB").cures[0].change


def test_an_old_wording_means_no_new_model() -> None:
    old = "CUDA out of memory. Tried to allocate 4.64 GiB (GPU 0; 79.25 GiB total capacity; 77.00 GiB already allocated; "
    names = {family.name: family.released for family in families()}
    for candidate in explain(old, "log").candidates[:2]:
        assert not candidate.models or min(names[name] for name in candidate.models) < 2024.4


@pytest.mark.parametrize("text", ["2.00 MiB", "20.00 MiB"])
def test_a_small_segment_says_nothing(text: str) -> None:
    diagnosis = asked(text)
    assert not diagnosis.candidates
    assert says_nothing(diagnosis.message)
    assert diagnosis.notes[0] == says_nothing(diagnosis.message)


@pytest.mark.parametrize("text", ["17592186044416.00 GiB", "355430.00 GiB", "9007199254740992.00 MiB"])
def test_an_absurd_size_is_called_so(text: str) -> None:
    diagnosis = asked(text)
    assert (diagnosis.causes[0].name, diagnosis.causes[0].certainty) == ("huge request", "certain")
    assert not diagnosis.candidates


def test_sizes_rounded_before_they_were_printed_are_wider() -> None:
    plain = asked("7.00 GiB").message
    rounded = asked("7.00 GiB", "PYTORCH_CUDA_ALLOC_CONF=roundup_power2_divisions:8\n")
    assert plain.requested_low is not None
    assert rounded.message.requested_low is not None
    assert rounded.message.requested_low <= 6.5 * GIB + 1 < plain.requested_low
    assert any("roundup_power2_divisions" in note for note in rounded.notes)


@pytest.mark.parametrize(
    ("numbers", "name", "certainty"),
    [
        ({"text": "3.00 GiB"}, "real need", "certain"),
        ({"text": "3.00 GiB", "allocated": "60.00 GiB", "unallocated": "17.00 GiB"}, "fragmentation", "likely"),
        ({"text": "3.00 GiB", "allocated": "75.00 GiB", "unallocated": "2.50 GiB"}, "fragmentation", "likely"),
        ({"text": "3.00 GiB", "free": "9.00 GiB", "allocated": "68.00 GiB"}, "allocator gave up", "likely"),
        ({"text": "90.00 GiB"}, "huge request", "certain"),
        (
            {
                "text": "3.00 GiB",
                "allocated": "40.00 GiB",
                "more": "Process 7 has 36.00 GiB memory in use. Including non-PyTorch memory, this process has 41.00 GiB "
                "memory in use. ",
            },
            "other process",
            "likely",
        ),
        (
            {
                "text": "3.00 GiB",
                "allocated": "40.00 GiB",
                "more": "Including non-PyTorch memory, this process has 41.00 GiB memory in use. ",
            },
            "other process",
            "likely",
        ),
        ({"text": "3.00 GiB", "free": "60.00 GiB", "allocated": "8.00 GiB", "more": "10.00 GiB allowed; "}, "limit", "certain"),
    ],
)
def test_the_first_cause_is_the_one_that_the_numbers_speak_for(numbers: dict[str, str], name: str, certainty: str) -> None:
    given: dict[str, Any] = dict(numbers)
    first = asked(given.pop("text"), **given).causes[0]
    assert (first.name, first.certainty) == (name, certainty), first


def test_what_was_missing_adds_up() -> None:
    need = next(cause for cause in asked("3.00 GiB").causes if cause.name == "real need")
    assert need.numbers["missing"] == need.numbers["requested"] - need.numbers["free"] - need.numbers["unallocated"]


def test_halving_the_batch_is_valued_by_the_tensor() -> None:
    stack = trace(("deepspeed/moe/sharded_moe.py", "top2gating", 'einsum("sec,sm->ecm")'))
    experts = asked("6.56 GiB", stack)
    (half,) = [cure for cure in experts.cures if "halve" in cure.change]
    assert half.saves_bytes == experts.candidates[0].bytes * 3 // 4
    step = trace(("torch/optim/adamw.py", "_init_group", "exp_avg = torch.zeros_like(p)"))
    weights = asked("4.64 GiB", step)
    assert weights.cures[0].saves_bytes == 0
    assert "removes nothing" in weights.cures[0].change
    for cure in (*experts.cures, *weights.cures):
        assert cure.allocated_peak_bytes is cure.reserved_peak_bytes is cure.samples_per_second is cure.fits is None


def test_lengths_are_told_in_words() -> None:
    assert "576 tokens" in length_in_words(2623)
    assert "2 images" in length_in_words(3198)
    assert "power of two" in length_in_words(4096)
    assert length_in_words(3001) == ""


def test_plausibilities_of_lengths_are_consistent() -> None:
    priors = Priors()
    assert sum(priors.batches.values()) == pytest.approx(1.0)
    total, best = priors.lengths(2600, 2640)
    assert best == 2623
    assert total == pytest.approx(sum(priors.length(tokens) for tokens in range(2600, 2641)), rel=0.1)
    assert priors.lengths(5, 4) == (0.0, 0)
    assert priors.lengths(2623, 2623) == (priors.length(2623), 2623)


def test_guesses_lie_in_the_size() -> None:
    from oomph.core.oom.clues import Clues

    nothing = Clues({}, {}, frozenset(), frozenset(), (), (), (), 0.0)
    size = Size(2 * GIB - 4 * MIB, 2 * GIB)
    found = guesses(size, nothing)
    assert len({guess.kind for guess in found}) >= 6
    assert all(size.low <= guess.bytes <= size.high and guess.weight > 0 for guess in found)
