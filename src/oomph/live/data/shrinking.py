"""Samples with smaller images, for those that do not fit by themselves."""

from __future__ import annotations

from collections.abc import Iterator

from oomph.live.data.collating import Prepared
from oomph.live.data.dataset import Dataset
from oomph.live.data.encoding import Encoder, open_encoder
from oomph.recipe import Recipe, Stage


class Shrinker:
    """Makes samples anew with smaller images, where the model takes images of other shapes.

    Args:
        data: the samples.
        recipe: the recipe.
        stage: the stage that they are for.
    """

    def __init__(self, data: Dataset, recipe: Recipe, stage: Stage) -> None:
        self._data, self._recipe, self._stage = data, recipe, stage
        self._encoders: list[Encoder] = []

    def __call__(self, sample: Prepared) -> Prepared | None:
        """The sample with the next smaller images that make a difference; None where there are none."""
        if not sample.images:
            return None
        for encoder in self._smaller_and_smaller():
            made = self._data.prepare(sample.index, encoder)
            if made.cost.image_tokens < sample.cost.image_tokens:
                return made
        return None

    def _smaller_and_smaller(self) -> Iterator[Encoder]:
        yield from self._encoders
        while True:
            vision = (self._encoders[-1] if self._encoders else self._data.encoder).vision
            shape = None if vision is None else vision.smaller_shape()
            if shape is None:
                return
            limits = self._stage.data.model_copy(update={"image_size": shape})
            smaller = self._stage.model_copy(update={"data": limits})
            self._encoders.append(open_encoder(self._recipe, smaller, lambda sentence: None))
            yield self._encoders[-1]
