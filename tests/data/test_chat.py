"""Label masks against the tokenizer's own rendering, and against texts that are put together by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from oomph.errors import UserError
from oomph.live.data.chat import Chat, ImageText
from oomph.live.data.encoding import Encoded, Encoder
from oomph.live.data.samples import BadSample, Sample, Turn
from oomph.live.data.templating import choose_template
from oomph.live.step import IGNORED
from oomph.recipe import Data

SYSTEM = "You are terse."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions."
)
WORDS = st.text("aB é\n猫🐈<|>1 ", min_size=0, max_size=12)
ANSWERS = WORDS.filter(lambda text: bool(text.strip()))


def written(style: str, questions: Sequence[str], answers: Sequence[str], system: bool) -> list[tuple[str, bool]]:
    """A conversation piece by piece, each with whether the assistant says it."""
    pieces: list[tuple[str, bool]] = []
    last = len(answers) - 1
    if style in ("chatml", "marked", "thinking"):
        pieces += [(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", False)] if system else []
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            pieces += [(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False)]
            thoughts = "<think>\n\n</think>\n\n" if style == "thinking" and number == last else ""
            pieces += [(f"{thoughts}{answer}<|im_end|>", True), ("\n", False)]
    elif style == "llama2":
        first = f"<<SYS>>\n{SYSTEM}\n<</SYS>>\n\n" if system else ""
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            before = f"<s>[INST] {first if number == 0 else ''}{question.strip()} [/INST] "
            pieces += [(before, False), (f"{answer.strip()} </s>", True)]
    elif style == "vicuna":
        pieces += [("<s>A chat.", False)]
        for question, answer in zip(questions, answers, strict=True):
            pieces += [(f" USER: {question} ASSISTANT:", False), (f" {answer}</s>", True)]
    return pieces


def expected(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Ids and labels: a token is the assistant's that ends in its characters, or begins there."""
    text = "".join(piece for piece, _ in pieces)
    mine = np.concatenate([np.full(len(piece), said) for piece, said in pieces])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = []
    for number, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        labels.append(number if mine[start : max(end, start + 1)].any() else IGNORED)
    return encoded["input_ids"], labels


def turns_of(questions: Sequence[str], answers: Sequence[str], system: bool) -> tuple[Turn, ...]:
    turns = [Turn("system", SYSTEM)] if system else []
    for question, answer in zip(questions, answers, strict=True):
        turns += [Turn("user", question), Turn("assistant", answer)]
    return tuple(turns)


def encode(tokenizer: Any, turns: tuple[Turn, ...], **data: Any) -> Encoded | BadSample:
    limits = Data.model_validate({"max_tokens": 4096, **data})
    encoder = Encoder(LlamaConfig(vocab_size=600), tokenizer, None, limits)
    return encoder.encode([Sample("", (), turns)], [[]])[0]


@pytest.mark.parametrize("family", ["bytes", "spaces"])
@pytest.mark.parametrize("style", ["chatml", "llama2", "vicuna", "marked", "thinking"])
@given(
    pairs=st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=4),
    system=st.booleans(),
)
@example(pairs=[("a", "b"), ("c", "b"), ("b", " b \n")], system=True)
@example(pairs=[("user", "assistant"), ("assistant", "user")], system=False)
@example(pairs=[(" a", "猫🐈"), ("🐈", "a\n\n")], system=False)
@settings(max_examples=15)
def test_labels_are_what_the_assistant_says(
    make_tokenizer: Callable[..., Any], style: str, family: str, pairs: list[tuple[str, str]], system: bool
) -> None:
    tokenizer = make_tokenizer(style, family)
    questions, answers = zip(*pairs, strict=True)
    if style == "vicuna":
        system = False
    turns = turns_of(questions, answers, system)
    encoded = encode(tokenizer, turns)
    assert isinstance(encoded, Encoded), encoded
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    own = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=style == "marked")
    assert encoded.ids.tolist() == own["input_ids"]
    ids, labels = expected(tokenizer, written(style, questions, answers, system))
    assert encoded.ids.tolist() == ids
    assert encoded.labels.tolist() == labels
    if style == "marked":
        assert (encoded.labels != IGNORED).astype(int).tolist() == own["assistant_masks"]
    assert encoded.cost.label_tokens == sum(label != IGNORED for label in labels[1:])
    assert encoded.cost.tokens == encoded.cost.text_tokens == len(ids)


def test_a_character_of_several_tokens_at_the_end_keeps_all_of_them(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(None)
    choose_template(tokenizer, "plain")
    limits = Data.model_validate({"max_tokens": 64})
    tokenizer.chat_template = tokenizer.chat_template.replace(" + '\\n'", "")
    encoder = Encoder(LlamaConfig(vocab_size=600), tokenizer, None, limits)
    [encoded] = encoder.encode([Sample("", (), (Turn("user", "x"), Turn("assistant", "a🐈")))], [[]])
    assert isinstance(encoded, Encoded)
    assert tokenizer.decode([label for label in encoded.labels.tolist() if label != IGNORED]) == "a🐈"


def test_shipped_templates_write_what_llava_does(make_tokenizer: Callable[..., Any]) -> None:
    image = ImageText("<image>", "<image>", "<image>")
    for family, bos in (("bytes", ""), ("spaces", "<s>")):
        tokenizer = make_tokenizer(None, family)
        choose_template(tokenizer, "vicuna")
        turns = turns_of(["<image>\nWhat is it?", "Why?"], ["A dog.", "It barks."], system=False)
        rendered = Chat(tokenizer, image).render(turns, 1)
        asked, again = "USER: <image>\nWhat is it? ASSISTANT:", "USER: Why? ASSISTANT:"
        assert rendered.text == f"{bos}{VICUNA} {asked} A dog.</s>{again} It barks.</s>"
        assert [rendered.text[start:end] for start, end in rendered.spans] == [" A dog.</s>", " It barks.</s>"]
        choose_template(tokenizer, "plain")
        rendered = Chat(tokenizer, image).render(turns_of(["Describe it.\n<image>"], ["A dog."], system=False), 1)
        assert rendered.text == f"{bos}<image>A dog.\n"
        assert [rendered.text[start:end] for start, end in rendered.spans] == ["A dog.\n"]


def test_templates_with_parts_get_images_as_parts(make_tokenizer: Callable[..., Any]) -> None:
    pad = "<|image_pad|>"
    chat = Chat(make_tokenizer("parts"), ImageText(pad, pad, f"<|vision_start|>{pad}<|vision_end|>"))
    turns = turns_of(["<image>\nWhat? <image>", "And <image>?"], ["A dog.", "No."], system=True)
    rendered = chat.render(turns, 3)
    one = f"<|vision_start|>{pad}<|vision_end|>"
    assert rendered.text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{one}What? {one}<|im_end|>\n<|im_start|>assistant\n"
        f"A dog.<|im_end|>\n<|im_start|>user\nAnd {one}?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    )
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["A dog.<|im_end|>", "No.<|im_end|>"]


def test_templates_of_texts_get_images_with_what_stands_around_them(make_tokenizer: Callable[..., Any]) -> None:
    pad, whole = "<|image_pad|>", "\n\n<|vision_start|><|image_pad|><|vision_end|>\n\n"
    chat = Chat(make_tokenizer("chatml"), ImageText(pad, pad, whole))
    rendered = chat.render(turns_of(["<image>What?", "And <image>?"], ["A dog.", "No."], system=False), 2)
    assert rendered.text.count(whole) == 2
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["A dog.<|im_end|>", "No.<|im_end|>"]


def test_what_a_template_refuses_is_said(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    refused = encode(tokenizer, turns_of(["a"], ["b"], system=True))
    assert isinstance(refused, BadSample)
    assert refused.problems == ["the chat template refuses it: no system here"]


def test_a_template_that_rewrites_earlier_turns_is_no_source_of_labels(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    refused = encode(tokenizer, turns_of(["a"], ["b"], system=False))
    assert isinstance(refused, BadSample)
    assert "cannot be told" in str(refused)


def test_a_template_that_drops_what_is_said_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(UserError, match="drops what is said"):
        encode(tokenizer, turns_of(["a"], ["b"], system=False))


def test_templates_that_are_not_there(make_tokenizer: Callable[..., Any], tmp_path: Any) -> None:
    with pytest.raises(UserError, match="has no chat template") as missing:
        choose_template(make_tokenizer(None), None)
    assert "data.chat_template" in missing.value.hint
    with pytest.raises(UserError, match="did you mean `vicuna`"):
        choose_template(make_tokenizer(None), "vicunya")
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}{{ m")
    with pytest.raises(UserError, match="no Jinja template"):
        choose_template(make_tokenizer(None), str(broken))
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}")
    tokenizer = make_tokenizer("chatml")
    choose_template(tokenizer, str(own))
    assert tokenizer.chat_template == own.read_text()


def test_threads_do_not_disturb_each_other(make_tokenizer: Callable[..., Any]) -> None:
    """transformers keeps where the assistant speaks in the compiled template while it renders."""
    encoder = Encoder(LlamaConfig(vocab_size=600), make_tokenizer("marked"), None, Data.model_validate({"max_tokens": 4096}))
    samples = [Sample("", (), turns_of(["a " * number] * 9, ["b " * number] * 9, system=False)) for number in range(1, 25)]
    alone = [encoder.encode([sample], [[]])[0] for sample in samples]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda sample: encoder.encode([sample], [[]])[0], samples * 4))
    finally:
        sys.setswitchinterval(before)
    for one, other in zip(alone * 4, together, strict=True):
        assert isinstance(one, Encoded)
        assert isinstance(other, Encoded)
        assert one.labels.tolist() == other.labels.tolist()
