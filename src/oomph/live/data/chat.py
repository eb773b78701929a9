"""Conversations as text, and which characters of it the assistant says: those that the model learns to say.

A template that marks the assistant's part (``{% generation %}``) is believed. Of any other, the part is found turn by turn:
a turn begins where the conversation before it, with the beginning of an answer, ends, and it ends where the conversation with
it ends. Both have to be beginnings of the whole conversation's text. White space that a template writes behind the token that
ends a turn is not the assistant's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from oomph.errors import UserError
from oomph.live.data.samples import IMAGE_TAG, BadSample, Turn
from oomph.live.data.templating import Messages, Tokenizer, is_marked, render

Span = tuple[int, int]

_NOT_EXACT = "the chat template writes a turn otherwise where more turns follow, so what the assistant says cannot be told"
_MARKS = ("\ue000", "\ue001")


class ImageText(NamedTuple):
    """How an image is written.

    Attributes:
        placeholder: what chat templates that take a list of parts write for one.
        in_parts: what becomes of that, with the image token once.
        in_text: what becomes of a tag in a text, with the image token once.
    """

    placeholder: str
    in_parts: str
    in_text: str


class Rendered(NamedTuple):
    """A conversation's text, the characters of it that get labels, and whether each image is written once in it."""

    text: str
    spans: list[Span]


class _Layout(NamedTuple):
    """The text between the contents of a conversation of some shape; a span's ends as (piece, characters into it)."""

    pieces: list[str]
    spans: list[tuple[Span, Span]]

    def filled(self, contents: Sequence[str]) -> tuple[str, list[Span]]:
        starts, text = [], ""
        for piece, content in zip(self.pieces, [*contents, ""], strict=True):
            starts.append(len(text))
            text += piece + content
        return text, [(starts[a] + i, starts[b] + j) for (a, i), (b, j) in self.spans]


class Chat:
    """A tokenizer's chat template at work.

    Args:
        tokenizer: with its chat template.
        images: how images are written; None for a model that sees none.

    Raises:
        UserError: the template drops texts or images in every form in which they can be given.
    """

    def __init__(self, tokenizer: Tokenizer, images: ImageText | None) -> None:
        self._tokenizer, self._images = tokenizer, images
        self._marked = is_marked(tokenizer.chat_template)
        self._layouts: dict[tuple[tuple[str, ...], ...], _Layout | None] = {}
        self._special = tuple(tokenizer.get_added_vocab()) + tuple(tokenizer.all_special_tokens)
        forms = ["text"] if images is None else ["parts", "user parts", "text"]
        works = [form for form in forms if self._works(form)]
        if not works:
            raise UserError(
                f"the chat template drops {'what is said' if images is None else 'images or what is said'}",
                "set data.chat_template to a template for this model",
            )
        self._form = works[0]

    def _works(self, form: str) -> bool:
        """Whether the template takes contents in a form."""
        tag = IMAGE_TAG if self._images else ""
        turns = [Turn("user", f"{tag}{_MARKS[0]}"), Turn("assistant", _MARKS[1])]
        placeholder = self._images.placeholder if self._images and form != "text" else tag
        try:
            text, _ = render(_messages(turns, form), self._tokenizer)
        except Exception:  # a template says in its own ways what it does not take
            return False
        captions = self._marked and _MARKS[1] in text  # one that marks answers may drop questions, as captions have none
        heard = all(mark in text for mark in _MARKS) or captions
        return heard and placeholder in text and "'type'" not in text

    def render(self, turns: Sequence[Turn], num_images: int) -> Rendered:
        """A conversation's text with each image written once.

        Raises:
            BadSample: the template refuses the conversation, or the assistant's part of it cannot be told exactly.
        """
        messages = _messages(turns, self._form)
        text, spans = self._rendered(messages)
        if not self._marked:
            spans = self._spans(messages, text)
        if self._images is None:
            return Rendered(text, spans)
        written = IMAGE_TAG if self._form == "text" else self._images.placeholder
        if text.count(written) != num_images:
            raise BadSample([f"the chat template writes {text.count(written)} of its {num_images} images"])
        new = self._images.in_text if self._form == "text" else self._images.in_parts
        return Rendered(text, spans) if new == written else _replaced(text, spans, written, new)

    def _rendered(self, messages: Messages, prompt: bool = False) -> tuple[str, list[Span]]:
        try:
            return render(messages, self._tokenizer, prompt)
        except Exception as error:  # templates raise what they like, and miss what they like
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadSample([f"the chat template refuses it: {reason}"]) from None

    def _spans(self, messages: Messages, text: str) -> list[Span]:
        """The assistant's characters. A template that only joins texts is learned once for each sequence of roles."""
        shape = tuple((message["role"], *_kinds(message)) for message in messages)
        if shape not in self._layouts:
            self._layouts[shape] = self._learn(messages)
        layout, contents = self._layouts[shape], _contents(messages)
        for given in (contents, [content.strip() for content in contents]) if layout else ():
            built, spans = layout.filled(given) if layout else ("", [])
            if built == text:
                return spans
        return self._turn_by_turn(messages, text)

    def _learn(self, messages: Messages) -> _Layout | None:
        """What the template writes around the contents; None where it does not write each of them once and in order."""
        marks = [f"{_MARKS[0]}{number}{_MARKS[1]}" for number in range(len(_contents(messages)))]
        known = _with_contents(messages, marks)
        try:
            text, _ = self._rendered(known)
            spans = self._turn_by_turn(known, text)
        except BadSample:
            return None
        pieces, rest, starts = [], text, []
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                return None
            pieces.append(piece)
        pieces.append(rest)
        at = 0
        for piece, mark in zip(pieces, [*marks, ""], strict=True):
            starts.append(at)
            at += len(piece) + len(mark)
        places = [tuple(_place(end, starts, pieces) for end in span) for span in spans]
        if any(None in pair for pair in places):
            return None
        return _Layout(pieces, places)  # type: ignore[arg-type]

    def _turn_by_turn(self, messages: Messages, text: str) -> list[Span]:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._start(messages[:number], message, text)
                spans.append((start, self._end(messages, number, text, start)))
        return spans

    def _start(self, before: Messages, message: dict[str, object], text: str) -> int:
        """Where an answer begins: behind its beginning where the template knows one, else with its content."""
        if before:
            prompt, plain = self._rendered(before, prompt=True)[0], self._rendered(before)[0]
        else:
            prompt = plain = ""
        if prompt != plain and text.startswith(prompt):
            return len(prompt)
        content = _contents([message])[0].strip()
        found = text.find(content, len(plain)) if text.startswith(plain) else -1
        if found < 0:
            raise BadSample([_NOT_EXACT])
        return found

    def _end(self, messages: Messages, number: int, text: str, start: int) -> int:
        """Where an answer ends. A template that adds something to the last answer alone ends all of them as it ends this."""
        after = self._rendered(messages[: number + 1])[0]
        if text.startswith(after) and len(after) > start:
            return start + len(self._said(after[start:]))
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        whole = self._rendered(messages[: last + 1])[0]
        _, found, behind = whole.rpartition(_contents([messages[last]])[0].strip())
        content = _contents([messages[number]])[0].strip()
        tail, at = self._said(behind), text.find(content, start)
        if not found or at < 0 or not tail or not text.startswith(tail, at + len(content)):
            raise BadSample([_NOT_EXACT])
        return at + len(content) + len(tail)

    def _said(self, turn: str) -> str:
        """A turn without the white space behind a special token."""
        bare = turn.rstrip()
        return bare if bare != turn and bare.endswith(self._special) else turn


def _messages(turns: Sequence[Turn], form: str) -> Messages:
    """Turns as a template takes them: contents as texts, or as lists of parts."""
    in_parts = {"text": (), "parts": ("user", "assistant", "system"), "user parts": ("user",)}[form]
    return [{"role": turn.role, "content": _parts(turn.text) if turn.role in in_parts else turn.text} for turn in turns]


def _parts(text: str) -> list[dict[str, str]]:
    """A text with tags as parts. A line's end beside a tag belongs to the tag: templates write their own."""
    parts: list[dict[str, str]] = []
    pieces = text.split(IMAGE_TAG)
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece or len(pieces) == 1:
            parts.append({"type": "text", "text": piece})
    return parts


def _kinds(message: dict[str, object]) -> list[str]:
    content = message["content"]
    return [part["type"] for part in content] if isinstance(content, list) else ["string"]


def _contents(messages: Sequence[dict[str, object]]) -> list[str]:
    """All texts of the messages in their order."""
    found: list[str] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            found += [part["text"] for part in content if part["type"] == "text"]
        else:
            found.append(str(content))
    return found


def _with_contents(messages: Messages, texts: Sequence[str]) -> Messages:
    """The messages with other texts."""
    rest = iter(texts)
    return [
        {
            "role": message["role"],
            "content": [{"type": "text", "text": next(rest)} if part["type"] == "text" else part for part in message["content"]]
            if isinstance(message["content"], list)
            else next(rest),
        }
        for message in messages
    ]


def _place(at: int, starts: Sequence[int], pieces: Sequence[str]) -> Span | None:
    """A character as (piece, characters into it); None inside a content."""
    for number, (start, piece) in enumerate(zip(starts, pieces, strict=True)):
        if start <= at <= start + len(piece):
            return number, at - start
    return None


def _replaced(text: str, spans: Sequence[Span], old: str, new: str) -> Rendered:
    """The text with `old` replaced by `new`, and the spans where they then are."""
    pieces, moved = text.split(old), []
    for span in spans:
        before = [text.count(old, 0, end) * (len(new) - len(old)) for end in span]
        moved.append((span[0] + before[0], span[1] + before[1]))
    return Rendered(new.join(pieces), moved)
