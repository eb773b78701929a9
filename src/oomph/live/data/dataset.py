"""The data of a stage: what its samples cost, in what order they come, and each of them ready to be trained on."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from oomph.errors import UserError
from oomph.live.data.collating import Collator, Prepared
from oomph.live.data.encoding import Cost, Encoded, Encoder, open_encoder
from oomph.live.data.measuring import Kept, Measured, measure, named
from oomph.live.data.order import Order, Part
from oomph.live.data.pictures import decode, locate
from oomph.live.data.problems import Problems
from oomph.live.data.reading import Numbers, Source
from oomph.live.data.samples import BadSample, Sample, parse
from oomph.recipe import Recipe, Stage
from oomph.recipe.schema import DataFile

CHECK = "`oomph train RECIPE --check-data` checks all of the data before anything is trained"


class Fingerprint(NamedTuple):
    """A data file as a checkpoint remembers it."""

    path: str
    sha256: str
    samples: int
    weight: float


class Dataset:
    """All samples of a stage, numbered through from file to file.

    Attributes:
        encoder: what makes tokens of them; it holds the tokenizer and the image processor.
        costs: [samples, columns of `Cost`].
        cut: [samples]; tokens that the limit took away.
        collate: makes micro-batches.
    """

    def __init__(self, encoder: Encoder, sources: Sequence[Source], measured: Sequence[Measured]) -> None:
        self.encoder, self._sources = encoder, list(sources)
        self.costs: Numbers = np.concatenate([item.costs for item in measured])
        self.cut: Numbers = np.concatenate([item.cut for item in measured])
        self._ends = list(itertools.accumulate(len(item.costs) for item in measured))
        self.collate = Collator(encoder.config, encoder.vision.token_id if encoder.vision else -1, _padding(encoder))

    def __len__(self) -> int:
        return self._ends[-1]

    def order(self, seed: int = 0, shuffle: bool = True) -> Order:
        """The order in which they come.

        Raises:
            UserError: the weights leave an epoch without a sample.
        """
        order = Order([Part(len(source), source.weight) for source in self._sources], seed, shuffle)
        if not order.epoch_samples:
            raise UserError("the weights of data.files leave an epoch without a sample", "give one of them a larger weight")
        return order

    def fingerprints(self) -> list[Fingerprint]:
        """The files, so that a later run can tell whether its data is the same."""
        return [Fingerprint(item.name, item.sha256, len(item), item.weight) for item in self._sources]

    def cost(self, index: int) -> Cost:
        """What a sample costs."""
        return Cost(*self.costs[index].tolist())

    def place(self, index: int) -> str:
        """The file of a sample, with its line or number there."""
        source, number = self._find(index)
        return source.place(number)

    def sample(self, index: int) -> Sample:
        """A sample as it was written.

        Raises:
            UserError: its file has changed since it was measured.
        """
        source, number = self._find(index)
        try:
            return parse(next(source.records(number, number + 1)))
        except (OSError, BadSample) as error:
            raise UserError(f"{source.place(number)}: {error}", f"has the file changed? {CHECK}") from None

    def prepare(self, index: int, encoder: Encoder | None = None) -> Prepared:
        """A sample with its images decoded, the same each time. It is safe to call from several threads.

        Args:
            index: its number.
            encoder: another one than that whose costs were measured, as one for smaller images.

        Raises:
            UserError: its file or one of its images has changed or gone since it was measured.
        """
        sample, (source, number) = self.sample(index), self._find(index)
        name, other, encoder = named(source.place(number), sample.id), encoder is not None, encoder or self.encoder
        try:
            encoder.check(sample)
            images = [decode(locate(source.images, image)) for image in sample.images]
            encoded = encoder.encode([sample], [[(image.height, image.width) for image in images]])[0]
            if isinstance(encoded, BadSample):
                raise encoded
            if not other:
                self._compare(index, encoded)
            vision, seen = encoder.vision, images[: encoded.cost.images]
            tensors = tuple(vision.tensors(image) for image in seen) if vision else ()
        except BadSample as error:
            raise UserError([f"{name}: {problem}" for problem in error.problems], CHECK) from None
        return Prepared(index, name, torch.from_numpy(encoded.ids), torch.from_numpy(encoded.labels), tensors, encoded.cost)

    def _compare(self, index: int, encoded: Encoded) -> None:
        """Checks that the sample costs what steps were planned with."""
        if encoded.cost != self.cost(index):
            raise BadSample([f"it has {encoded.cost.tokens} tokens now and had {self.cost(index).tokens} when it was measured"])

    def _find(self, index: int) -> tuple[Source, int]:
        file = bisect.bisect_right(self._ends, index)
        return self._sources[file], index - (self._ends[file - 1] if file else 0)


def open_dataset(
    recipe: Recipe, stage: Stage, notify: Callable[[str], None], evaluation: bool = False, fresh: bool = False
) -> Dataset:
    """The data of a stage, checked as a whole. What was measured before, of the same files, is not measured again.

    Args:
        recipe: the recipe.
        stage: one of its stages.
        notify: told in a sentence what is noteworthy and no mistake.
        evaluation: whether the files of `data.evaluation` are meant.
        fresh: whether everything is measured again, images included.

    Raises:
        UserError: the model's parts do not go together, or samples are not what they should be.
    """
    encoder = open_encoder(recipe, stage, notify)
    files = encoder.data.evaluation if evaluation else encoder.data.files
    section = "data.evaluation" if evaluation else "data.files"
    if not files:
        raise UserError(f"stage {stage.name}: {section} names no file", f"{section}: [{{path: train.json, images: pictures}}]")
    problems, sources, measured = Problems(), [], []
    for file in files:
        source = _open(file, problems)
        if source is None:
            continue
        kept = Kept(source, encoder, notify)
        found = None if fresh else kept.read(source)
        if found is None:
            before = problems.count
            try:
                found = measure(source, encoder, problems)
            except OSError as error:
                problems.add(file.path, f"it cannot be read: {error.strerror or error}")
                continue
            if problems.count == before:
                kept.write(source, found)
        if found.repeated_ids:
            notify(f"{file.path}: samples with the id of an earlier one: {found.repeated_ids:,}; all are trained on")
        sources.append(source)
        measured.append(found)
    problems.raise_any("mend or remove these samples; images are looked for in the `images` folder of each data file")
    return Dataset(encoder, sources, measured)


def _open(file: DataFile, problems: Problems) -> Source | None:
    """A file, hashed; its problem is noted where that fails."""
    try:
        source = Source(file)
    except OSError as error:
        problems.add(file.path, f"it cannot be read: {error.strerror or error}; paths start from the folder {Path.cwd()}")
        return None
    if not source.images.is_dir():
        problems.add(file.path, f"its images' folder {source.images} is not there")
        return None
    return source


def _padding(encoder: Encoder) -> int:
    """A token to fill up with: the tokenizer's, where the model has it and it is no image."""
    tokenizer, image = encoder.tokenizer, encoder.vision.token_id if encoder.vision else -1
    vocabulary = int(encoder.config.get_text_config().vocab_size)
    candidates: list[int | None] = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0, 1]
    return next(token for token in candidates if token is not None and token != image and token < vocabulary)
