"""How well a trained model answers: every answer of a data file against the model's own, word for word."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from oomph.core.catalogue import find_model
from oomph.live.data.dataset import Dataset, open_dataset
from oomph.live.data.encoding import Encoded
from oomph.live.data.pictures import decode, locate, read_header
from oomph.live.data.reading import Source
from oomph.live.data.samples import IMAGE_TAG, Sample
from oomph.live.generate import Answerer, answer_starts, open_answerer, prompt_before, recipe_of, room_of
from oomph.live.model import read_config
from oomph.recipe.schema import DataFile

BATCH = 8
SHOWN = 5
_SHORTEST_LIMIT = 32
_MOST_IMAGES = 64
_COLUMNS = (34, 24, 24)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_JOINING = re.compile("['\u2019]|(?<=\\d),(?=\\d)")
"""What joins: an apostrophe, the comma of a thousand."""
_PARTING = re.compile(r"(?<!\d)\.|\.(?!\d)|(?<=\w)-|-(?!\d)|[^\w\s.-]|_")
"""All other punctuation, but for the point within a number and the minus before one."""


@dataclass(frozen=True)
class Answer:
    """One question: where it stands, what was asked, answered and expected, and how right that is.

    `exact` says whether answer and expected answer are the same once normalised. `accuracy` is VQA's where the sample has
    the answers of several people, else 1 or 0 as `exact` says.
    """

    place: str
    question: str
    answer: str
    expected: str
    exact: bool
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """All questions of a data file, in its order."""

    model: str
    data: str
    answers: tuple[Answer, ...]

    @property
    def exact_match(self) -> float:
        """The share of exact answers."""
        return sum(answer.exact for answer in self.answers) / len(self.answers)

    @property
    def accuracy(self) -> float:
        """The mean accuracy."""
        return sum(answer.accuracy for answer in self.answers) / len(self.answers)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        totals = {"questions": len(self.answers), "exact_match": self.exact_match, "accuracy": self.accuracy}
        head = {"schema": 1, "kind": "evaluation", "model": self.model, "data": self.data}
        return {**head, **totals, "answers": [asdict(answer) for answer in self.answers]}


class _Question(NamedTuple):
    """A place of a sample where the assistant speaks: the sample's number, its tokens, where the answer begins and ends."""

    sample: int
    encoded: Encoded
    start: int
    end: int
    text: str


def evaluate(
    name: str,
    data: str,
    images: str | None = None,
    batch: int = BATCH,
    notify: Callable[[str], None] = lambda sentence: None,
    progress: Callable[[int, int], None] = lambda done, all_questions: None,
) -> Evaluation:
    """Asks a model every question of a data file.

    Questions of one length are asked together, so that no prompt is filled up and each is computed as if it were alone.

    Args:
        name: the model's folder.
        data: the file; each answer of its conversations is asked for, with what stands before it as it was written.
        images: the folder of its images; None for the file's own.
        batch: questions that are asked at a time.
        notify: told in a sentence what is noteworthy and no mistake.
        progress: told how many questions of how many are answered.

    Raises:
        UserError: the model or the data are not there whole.
    """
    file = DataFile(path=data, images=images)
    folder = find_model(name)
    room = room_of(read_config(folder))
    recipe = recipe_of(folder, _MOST_IMAGES, files=[{"path": data, "images": images}], max_tokens=room)
    dataset = open_dataset(recipe, recipe.stages[0], notify)
    if cut := int((dataset.cut > 0).sum()):
        notify(f"{cut} samples are longer than the {room} tokens that the model takes, and are cut to them")
    answerer = open_answerer(name, _MOST_IMAGES, notify, dataset.encoder)
    source = Source(file)
    source.scan()
    questions = [question for index in range(len(dataset)) for question in _questions(dataset, source, index)]
    limit = max(_SHORTEST_LIMIT, *(question.end - question.start for question in questions))
    order = sorted(range(len(questions)), key=lambda number: (questions[number].start, number))
    said: dict[int, str] = {}
    for group in _groups(order, questions, batch):
        prompts = [_prompt(answerer, dataset, source, questions[number]) for number in group]
        for number, tokens in zip(group, answerer.answers(prompts, limit), strict=True):
            said[number] = answerer.text(tokens).strip()
        progress(len(said), len(questions))
    references = [_references(record) for record in source.records(0, len(source))]
    judged = [
        _judge(answerer, dataset, question, said[number], references[question.sample])
        for number, question in enumerate(questions)
    ]
    return Evaluation(name, data, tuple(judged))


def _questions(dataset: Dataset, source: Source, index: int) -> Iterator[_Question]:
    """The places of a sample where the assistant speaks."""
    sample = dataset.sample(index)
    sizes = [read_header(locate(source.images, image)) for image in sample.images]
    [encoded] = dataset.encoder.encode([sample], [sizes])
    assert isinstance(encoded, Encoded), "the data are checked"
    for (start, end), text in zip(answer_starts(encoded), _asked(sample), strict=False):
        yield _Question(index, encoded, start, end, text)


def _asked(sample: Sample) -> Iterator[str]:
    """What was asked before each answer, in one line."""
    text = ""
    for turn in sample.turns:
        if turn.role == "assistant":
            yield text
        elif turn.role == "user":
            text = " ".join(turn.text.replace(IMAGE_TAG, " ").split())


def _groups(order: Sequence[int], questions: Sequence[_Question], batch: int) -> Iterator[list[int]]:
    """Numbers of questions with prompts of one length, `batch` at a time."""
    group: list[int] = []
    for number in order:
        if group and (len(group) == batch or questions[group[0]].start != questions[number].start):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _prompt(answerer: Answerer, dataset: Dataset, source: Source, question: _Question) -> Any:
    vision, sample = answerer.encoder.vision, dataset.sample(question.sample)
    pictures = [decode(locate(source.images, image)) for image in sample.images] if vision else []
    seen = []
    if vision is not None:
        left = int((question.encoded.ids[: question.start] == vision.token_id).sum())
        for picture in pictures:
            if left > 0:
                seen.append(vision.tensors(picture))
                left -= vision.cost((picture.height, picture.width)).tokens
    return prompt_before(question.encoded, question.start, seen)


def _references(record: Any) -> list[str]:
    """The answers of several people, where a record has some: texts, or objects with an `answer` as VQA's data have."""
    given = record.get("answers") if isinstance(record, dict) else None
    if not isinstance(given, list):
        return []
    texts = [item.get("answer") if isinstance(item, dict) else item for item in given]
    return [text for text in texts if isinstance(text, str)]


def _judge(answerer: Answerer, dataset: Dataset, question: _Question, answer: str, references: Sequence[str]) -> Answer:
    expected = answerer.text(question.encoded.ids[question.start : question.end].tolist()).strip()
    exact = normalised(answer) == normalised(expected)
    accuracy = vqa_accuracy(answer, references) if references else float(exact)
    return Answer(dataset.place(question.sample), question.text, answer, expected, exact, accuracy)


def normalised(text: str) -> str:
    """A text as answers are compared: lower case, without articles, punctuation and double spaces, small numbers as digits.

    A text of nothing else stays as it is.
    """
    lower = text.lower().strip()
    words = _PARTING.sub(" ", _JOINING.sub("", lower)).split()
    return " ".join(_WORDS.get(word, word) for word in words if word not in _ARTICLES) or lower


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The VQA challenge's accuracy: an answer is right if three people gave it, averaged over all but one of them.

    As in VQA's ``vqaEval.py`` (github.com/GT-Vision-Lab/VQA), after our own `normalised`.
    """
    ours, theirs = normalised(answer), [normalised(reference) for reference in references]
    if len(theirs) == 1:
        return float(ours == theirs[0])
    matches = theirs.count(ours)
    scores = [min(1.0, (matches - (reference == ours)) / 3) for reference in theirs]
    return sum(scores) / len(scores)


def describe(evaluation: Evaluation) -> str:
    """The evaluation as text, with some of the wrong answers."""
    answers = evaluation.answers
    exact = sum(answer.exact for answer in answers)
    lines = [f"exact match  {evaluation.exact_match:7.1%}   {exact:,} of {len(answers):,} answers"]
    if any(answer.accuracy != answer.exact for answer in answers):
        lines.append(f"VQA accuracy {evaluation.accuracy:7.1%}")
    wrong = [answer for answer in answers if not answer.exact]
    if wrong:
        shown = f"the first {SHOWN} of {len(wrong):,}" if len(wrong) > SHOWN else f"{len(wrong)}"
        lines += ["", f"wrong answers: {shown}", "", _row("question", "answer", "expected")]
        lines += [_row(answer.question, answer.answer or "(nothing)", answer.expected) for answer in wrong[:SHOWN]]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    cut = (_cut(cell, width) for cell, width in zip(cells, _COLUMNS, strict=True))
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cut, _COLUMNS, strict=True)).rstrip()


def _cut(text: str, width: int) -> str:
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= width else f"{line[: width - 3]}..."
