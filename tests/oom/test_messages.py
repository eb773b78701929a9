"""Messages in every state in which they are pasted: cut, wrapped, tangled, prefixed, in markup, among logs; and no crash."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomph.core.oom.cleaning import decode
from oomph.core.oom.explain import explain
from oomph.core.oom.frames import phase_of
from oomph.core.oom.messages import MOST_MESSAGES, find_messages
from oomph.core.oom.sizes import before_rounding, read_size
from oomph.diagnosis_records import Frame
from oomph.errors import UserError
from oomph.units import GIB, MIB

NUMBERS = {
    "asked": "6.56 GiB",
    "gpu": 0,
    "capacity": "39.39 GiB",
    "allocated": "33.67 GiB",
    "free": "3.18 GiB",
    "reserved": "35.21 GiB",
    "unallocated": "1.54 GiB",
    "process": "36.10 GiB",
    "others": [[4711, "512.00 MiB"]],
}
ALLOCATOR = ["cuda 1.4", "cuda 1.11", "cuda 1.13", "cuda 2.1", "cuda 2.2", "cuda 2.5", "cuda 2.11", "hip 2.5", "hip 2.9"]
Message = Callable[[str, dict[str, Any]], str]


def check(text: str) -> None:
    """The text holds the message of `NUMBERS` and no other."""
    messages = find_messages(text).messages
    assert len(messages) == 1, messages
    (found,) = messages
    assert found.requested_bytes == round(6.56 * GIB)
    assert found.allocated_bytes == round(33.67 * GIB)
    assert found.free_bytes == round(3.18 * GIB)
    assert found.capacity_bytes == round(39.39 * GIB)
    assert not found.truncated


@pytest.mark.parametrize("wording", ALLOCATOR)
class TestStates:
    """The one message in every state."""

    def test_alone(self, wording: str, message: Message) -> None:
        check(message(wording, NUMBERS))

    def test_wrapped_at_every_width(self, wording: str, message: Message) -> None:
        text = message(wording, NUMBERS)
        for width in range(30, 120, 7):
            lines = [text[start : start + width] for start in range(0, len(text), width)]
            check("\n".join(lines))

    def test_wrapped_at_spaces(self, wording: str, message: Message) -> None:
        words, lines = message(wording, NUMBERS).split(" "), [""]
        for word in words:
            lines[-1:] = [f"{lines[-1]} {word}"] if len(lines[-1]) < 60 else [lines[-1], word]
        check("\n".join(lines))

    def test_in_markup_and_colour(self, wording: str, message: Message) -> None:
        text = message(wording, NUMBERS)
        check(f"\x1b[31m\x1b[1m{text}\x1b[0m")
        check(f"<pre><code>{text.replace('>>', '&gt;&gt;').replace(' is ', ' <b>is</b> ')}</code></pre><br>")
        check(f"> {text}")
        check(json.dumps({"error": f"Traceback (most recent call last):\n{text}", "code": 1}))

    def test_with_line_ends_of_windows_and_progress_bars(self, wording: str, message: Message) -> None:
        text = message(wording, NUMBERS)
        check(f"  5%|█         | 5/100 [00:10<03:20,  2.11s/it]\rloading\r\n{text}\r\nmore\r\n")

    @pytest.mark.parametrize("prefix", ["[rank3]: ", "[default3]:", "rank3: ", "[1,3]<stderr>:"])
    def test_with_a_rank(self, wording: str, prefix: str, message: Message) -> None:
        text = f"{prefix}{message(wording, NUMBERS)}"
        check(text)
        assert find_messages(text).messages[0].rank == 3

    @pytest.mark.parametrize(
        "prefix",
        [
            "2021-12-08T01:25:15.38740516Z ",
            "2023-09-14 21:27:58.000 [INFO] ",
            "(RayTrainWorker pid=4711, ip=10.0.0.1) ",
            "Nov 24 10:00:00 host kernel: ",
            "worker-1  | ",
            "ERROR: ",
        ],
    )
    def test_with_a_log_around_it(self, wording: str, prefix: str, message: Message) -> None:
        before = ["starting", "Traceback (most recent call last):", '  File "a.py", line 3, in forward', "    x = f(y)"]
        after = ["[launch.py:318:sigkill_handler] Killing subprocess 1534", "exits with return code = 1"]
        check("\n".join(prefix + line for line in [*before, message(wording, NUMBERS), *after]))

    def test_ranks_line_by_line(self, wording: str, message: Message) -> None:
        lines = []
        for line in ("Traceback (most recent call last):", '  File "m.py", line 7, in forward', message(wording, NUMBERS)):
            lines += [f"[rank{rank}]: {line}" for rank in (0, 1, 2)]
        check("\n".join(lines))
        assert find_messages("\n".join(lines)).messages[0].repeats == 3

    def test_every_beginning_of_it_can_be_read(self, wording: str, message: Message) -> None:
        text = message(wording, NUMBERS)
        for end in range(text.index("Tried"), len(text), 9):
            find_messages(text[:end])
        cut = find_messages(text[: text.index("6.56 GiB") + 8]).messages[0]
        assert (cut.requested_bytes, cut.truncated) == (round(6.56 * GIB), True)


@pytest.mark.parametrize(
    ("wording", "versions"),
    [
        ("cuda 1.4", "1.4 to 2.0"),
        ("cuda 1.11", "1.10 to 2.0"),
        ("cuda 1.13", "1.13 to 2.0"),
        ("cuda 2.1", "2.1"),
        ("cuda 2.2", "2.2 to 2.4"),
        ("cuda 2.5", "2.4 or later"),
        ("cuda 2.11", "2.9 or later"),
    ],
)
def test_the_wording_tells_the_version(wording: str, versions: str, message: Message) -> None:
    assert find_messages(message(wording, NUMBERS)).messages[0].torch == versions


@pytest.mark.parametrize("most", [1, 2, 5, 40])
@pytest.mark.parametrize("wording", ["cuda 1.13", "cuda 1.4"])
def test_two_ranks_in_one_line_are_told_apart(wording: str, most: int, message: Message) -> None:
    random_numbers = random.Random(most)
    copies = [list(message(wording, {**NUMBERS, "gpu": gpu})) for gpu in (0, 1)]
    line: list[str] = []
    turn = 0
    while any(copies):
        length = 1 if most == 1 else random_numbers.randint(1, most)
        line += copies[turn][:length]
        del copies[turn][:length]
        turn = 1 - turn
    found = find_messages("".join(line))
    assert found.tangled
    assert {message.gpu for message in found.messages} == {0, 1}
    assert {message.requested_bytes for message in found.messages} == {round(6.56 * GIB)}
    assert {message.capacity_bytes for message in found.messages} == {round(39.39 * GIB)}


def test_different_ranks_are_different_messages_up_to_a_number(message: Message) -> None:
    lines = [f"[rank{n}]: {message('cuda 2.5', {**NUMBERS, 'free': f'{n}.50 MiB'})}" for n in range(1, MOST_MESSAGES + 11)]
    found = find_messages("\n".join(lines))
    assert len(found.messages) == MOST_MESSAGES
    assert found.left_out == 10


def test_a_message_is_found_in_a_long_log(message: Message) -> None:
    noise = "step 17 loss 1.25 grad norm 0.7 learning rate 2e-5 samples per second 3.1\n" * 20_000
    text = f"{noise}{message('cuda 2.5', NUMBERS)}\n{noise}"
    assert len(text) > 2_000_000
    check(text)
    assert find_messages(text).messages[0].line == 20_001


def test_wrapped_lines_of_the_kernel() -> None:
    text = "[2059.49] Out of memory: Killed process 25315 (python3) total-vm:53312244" + 60 * " "
    (found,) = find_messages(text + "kB, anon-rss:31451456kB, file-rss:74816kB, shmem-rss:12296kB, UID:0").messages
    assert found.process_bytes == (31451456 + 74816 + 12296) * 1024


@pytest.mark.parametrize(
    "text",
    [
        "",
        "all is well",
        "To avoid CUDA out of memory errors, use a smaller batch.",
        "This prevents out of memory. See the documentation.",
        "loss 6.56 GiB free lunch 20.00 MiB",
        "RuntimeError: CUDA error: device-side assert triggered",
        "Killed",
        "exits with return code = 1",
    ],
)
def test_a_text_without_a_report_says_so(text: str) -> None:
    with pytest.raises(UserError, match="no report of memory that ran out"):
        explain(text, "log")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b" \r\n\t\n", "is empty"),
        (b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0>\0\x01\xff\xff\xff", "is a binary file"),
    ],
)
def test_what_is_no_text_says_so(content: bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        decode(content, "log")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_encodings(encoding: str, message: Message) -> None:
    check(decode(f"Größe: {message('cuda 2.5', NUMBERS)}".encode(encoding), "log"))


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("6.56 GiB", 6712 * MIB + 1, 6722 * MIB),
        ("172.00 MiB", 170 * MIB + 1, 172 * MIB),
        ("20.00 MiB", MIB + 1, 20 * MIB),
        ("2.00 MiB", 1, MIB),
        ("12.00 MiB", 10 * MIB + 1, 12 * MIB),
        ("37.53 MiB", 39347815, 39358300),
        ("512 bytes", 512, 512),
    ],
)
def test_what_was_asked_for_lies_within_the_rounding(text: str, low: int, high: int) -> None:
    printed = read_size(text)
    assert printed is not None
    assert before_rounding(printed)[:2] == (low, high)


@given(st.integers(1, 2**43), st.sampled_from([0, 2, 4, 8, 16]))
def test_the_interval_holds_every_request_that_prints_so(nbytes: int, divisions: int) -> None:
    rounded = max(512, -(-nbytes // 512) * 512)
    if divisions > 1 and rounded > 512 * divisions and rounded & (rounded - 1):
        power = 1 << (rounded.bit_length() - 1)
        step = power // divisions
        rounded = power + -(-(rounded - power) // step) * step
    segment = 2 * MIB if rounded <= MIB else 20 * MIB if rounded < 10 * MIB else -(-rounded // (2 * MIB)) * 2 * MIB
    text = f"{segment / GIB:.2f} GiB" if segment > GIB else f"{segment / MIB:.2f} MiB"
    printed = read_size(text)
    assert printed is not None
    asked = before_rounding(printed, divisions)
    assert asked.low <= nbytes <= asked.high


def frames(*names: str) -> list[Frame]:
    """Frames by ``file:function``, the outermost first."""
    return [Frame(f"/usr/lib/python3/site-packages/{name.split(':')[0]}", 7, name.split(":")[1]) for name in names]


CALL = "torch/nn/modules/module.py:_call_impl"
TRAIN = ("transformers/trainer.py:train", "transformers/trainer.py:training_step")
BACKWARD = ("accelerate/accelerator.py:backward", "torch/_tensor.py:backward", "torch/autograd/__init__.py:backward")


@pytest.mark.parametrize(
    ("stack", "phase"),
    [
        ((*TRAIN, "transformers/trainer.py:compute_loss", CALL, "transformers/models/phi/modeling_phi.py:forward"), "forward"),
        ((*TRAIN, "transformers/trainer.py:compute_loss", CALL, "torch/nn/functional.py:cross_entropy"), "forward"),
        ((*TRAIN, *BACKWARD), "backward"),
        (
            (*TRAIN, "deepspeed/runtime/engine.py:backward", "deepspeed/runtime/zero/stage_1_and_2.py:reduce_ipg_grads"),
            "backward",
        ),
        (
            (*TRAIN, *BACKWARD, "torch/utils/checkpoint.py:backward", CALL, "transformers/models/phi/modeling_phi.py:forward"),
            "recompute",
        ),
        (
            (*TRAIN, *BACKWARD, "torch/utils/checkpoint.py:unpack_hook", "torch/utils/checkpoint.py:recompute_fn", CALL),
            "recompute",
        ),
        (("transformers/trainer.py:train", "accelerate/optimizer.py:step", "torch/optim/adamw.py:step"), "optimizer"),
        (("deepspeed/__init__.py:initialize", "deepspeed/runtime/zero/stage3.py:initialize_optimizer_states"), "optimizer"),
        (
            (
                "lightning/pytorch/trainer/trainer.py:fit",
                "torch/optim/adamw.py:step",
                "lightning/x.py:closure",
                CALL,
                "m.py:forward",
            ),
            "forward",
        ),
        (
            ("transformers/trainer.py:_save_checkpoint", "transformers/trainer.py:save_model", "torch/fsdp.py:state_dict"),
            "checkpoint saving",
        ),
        (
            (
                "transformers/trainer.py:_maybe_log_save_evaluate",
                "transformers/trainer.py:evaluate",
                "t.py:prediction_step",
                CALL,
            ),
            "evaluation",
        ),
        (("transformers/modeling_utils.py:from_pretrained", "transformers/modeling_utils.py:_load_pretrained_model"), "load"),
        (("peft/peft_model.py:x", "torch/nn/modules/module.py:to", "torch/nn/modules/module.py:_apply"), "load"),
        (("main.py:main", "main.py:run"), ""),
        ((), ""),
    ],
)
def test_the_phase_is_read_from_the_traceback(stack: tuple[str, ...], phase: str) -> None:
    found, why = phase_of(frames(*stack))
    assert found == phase
    assert bool(why) == bool(phase)


WORDS = """CUDA out of memory. Tried to allocate |6.56 GiB| (GPU 0; |39.39 GiB total capacity; |1 EB
|Traceback (most recent call last):
|  File "a.py", line 1, in f|[rank0]: |&gt;|<b>|GPU 0 has a total capacity of |is free. |Process 1 has | memory in use. |
|999999999999999999999999.99 GiB|MPS backend out of memory (|-1 bytes|Out of memory: Killed process 1 (|total-vm:|kB, anon-rss:|
|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure 2 'out of memory'|DefaultCPUAllocator: not enough memory: you tried to allocate |0|.|,
|already allocated; |ÄÖ\u00a0\u200b|\0|{|\\n|\r|\x1b[31m|Allocation on device 0 would exceed allowed memory|Requested : |
|roundup_power2_divisions:|per_device_train_batch_size 8|model_max_length 2048|reserved in total by PyTorch)""".split("|")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=12)), max_size=60).map("".join))
def test_no_text_makes_it_fall_over(text: str) -> None:
    try:
        diagnosis = explain(text, "log")
    except UserError:
        return
    assert type(diagnosis).from_json(json.loads(json.dumps(diagnosis.to_json()))) == diagnosis


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_no_file_makes_it_fall_over(content: bytes) -> None:
    with contextlib.suppress(UserError):
        assert explain(decode(content, "log"), "log").messages
