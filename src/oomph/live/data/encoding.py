"""From a conversation to token ids and labels, with images counted and the limits of the data kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import LlavaConfig, PretrainedConfig

from oomph.core.catalogue import find_model
from oomph.core.forms import code_digest, versions
from oomph.errors import UserError
from oomph.live.data.chat import Chat, Rendered
from oomph.live.data.pictures import Size
from oomph.live.data.samples import BadSample, Sample
from oomph.live.data.templating import Tokenizer, choose_template, digest, load_tokenizer, tokenizer_folder
from oomph.live.data.vision import ImageCost, Vision, open_vision
from oomph.live.model import compose_llava, read_config
from oomph.live.step import IGNORED
from oomph.recipe import Data, Parts, Recipe, Stage, data_of

Ids = NDArray[np.int64]


class Cost(NamedTuple):
    """What a sample costs, known before a pixel is decoded.

    Attributes:
        text_tokens: tokens that are no image tokens.
        image_tokens: tokens that images become.
        tokens: both.
        images: how many images the model sees.
        patches: of the vision tower, over all images.
        label_tokens: tokens that the loss is computed on: those with a label that have a token before them.
    """

    text_tokens: int
    image_tokens: int
    tokens: int
    images: int
    patches: int
    label_tokens: int


@dataclass(frozen=True)
class Encoded:
    """A sample's tokens.

    Attributes:
        ids: [tokens].
        labels: [tokens]; `IGNORED` wherever the assistant does not speak.
        cost: what it costs.
        cut_tokens: how many tokens the limit took away.
    """

    ids: Ids
    labels: Ids
    cost: Cost
    cut_tokens: int


class Encoder:
    """Makes tokens of samples, the same for the same sample wherever and whenever it runs.

    Where image tokens count towards `max_tokens`, they take their places first and the end of the sample is cut then; else
    it is cut while each image is one token. Nothing is cut inside an image: where the limit falls inside one, the sample
    ends before it. Of a sample that was cut, nothing is kept behind its last label, as nothing is learned from that.

    Attributes:
        config: the model's configuration.
        tokenizer: with the chat template in use.
        vision: the model's eyes; None for a text model.
        data: the limits.
    """

    def __init__(self, config: PretrainedConfig, tokenizer: Tokenizer, vision: Vision | None, data: Data) -> None:
        """Prepares the chat template.

        Raises:
            UserError: it does not take what conversations are made of, or the tokenizer splits the image's token.
        """
        self.config, self.tokenizer, self.vision, self.data = config, tokenizer, vision, data
        self._chat = Chat(tokenizer, vision.text if vision else None)
        self._vocabulary = int(config.get_text_config().vocab_size)
        self._image_id = -1
        if vision is not None:
            self._image_id = vision.token_id
            if self._tokens([vision.text.in_text])[0].ids.count(self._image_id) != 1:
                raise UserError("the tokenizer does not know the model's image token", "set `tokenizer` to the model's own")

    def digest(self) -> str:
        """A name for what is made of a sample: it changes with all that takes part in it."""
        limits = self.data.model_dump(include={"max_tokens", "image_tokens_count", "images_per_sample"})
        makers = [digest(self.tokenizer), self.vision.settings() if self.vision else None, self._vocabulary]
        code = [versions(["pillow", "tokenizers", "transformers"]), code_digest()]
        return hashlib.sha256(json.dumps([*makers, limits, *code], sort_keys=True).encode()).hexdigest()

    def check(self, sample: Sample) -> None:
        """Checks what a sample holds against the model and the limits, without its images.

        Raises:
            BadSample: they do not go together.
        """
        images, most = len(sample.images), self.data.images_per_sample
        if self.vision is None:
            if images:
                raise BadSample([f"it has {_many(images, 'image')}, and the model reads text alone"])
        elif images != sample.num_tags:
            tags = sample.num_tags
            raise BadSample([f"it has {_many(images, 'image')} and {_many(tags, '<image> tag')} in its text"])
        elif images > most:
            raise BadSample([f"it has {_many(images, 'image')}, more than data.images_per_sample {most}"])

    def encode(self, samples: Sequence[Sample], sizes: Sequence[Sequence[Size]]) -> list[Encoded | BadSample]:
        """The tokens of several samples that `check` has passed, or why there are none.

        Args:
            samples: conversations.
            sizes: of each sample, the sizes of its images.
        """
        results: list[Encoded | BadSample] = []
        rendered: list[Rendered | BadSample] = []
        for sample in samples:
            try:
                rendered.append(self._chat.render(sample.turns, len(sample.images)))
            except BadSample as error:
                rendered.append(error)
        texts = iter(self._tokens([item.text for item in rendered if isinstance(item, Rendered)]))
        for item, shapes in zip(rendered, sizes, strict=True):
            try:
                if isinstance(item, BadSample):
                    raise item
                results.append(self._encoded(next(texts), item, shapes))
            except BadSample as error:
                results.append(error)
        return results

    def _tokens(self, texts: list[str]) -> Any:
        return self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)

    def _encoded(self, encoding: Any, rendered: Rendered, sizes: Sequence[Size]) -> Encoded:
        ids = np.array(encoding.ids, np.int64)
        labels = np.full(len(ids), IGNORED, np.int64)
        for start, end in rendered.spans:
            first, last = _token_range(encoding, start, end)
            labels[first:last] = ids[first:last]
        labels[ids == self._image_id] = IGNORED
        costs = [self.vision.cost(size) for size in sizes] if self.vision else []
        self._check_ids(ids, len(costs))
        if not self.data.image_tokens_count:
            ids, labels, cut = self._cut(ids, labels, len(costs))
        ids, labels = self._spliced(ids, labels, costs)
        if self.data.image_tokens_count:
            ids, labels, cut = self._cut(ids, labels, sum(cost.tokens for cost in costs))
        return Encoded(ids, labels, self._cost(ids, labels, costs), cut)

    def _check_ids(self, ids: Ids, images: int) -> None:
        """Checks that the model has an embedding for every token, and that the images' token stands for images alone."""
        if len(ids) == 0:
            raise BadSample(["it has no tokens"])
        ours = ids == self._image_id
        if self.vision and int(ours.sum()) != images:
            raise BadSample([f"its text holds the token {self._image_id}, which stands for images in this model"])
        largest = int(ids[~ours].max(initial=0))
        if largest >= self._vocabulary:
            raise BadSample([f"its token {largest} is beyond the model's vocabulary of {self._vocabulary}"])

    def _spliced(self, ids: Ids, labels: Ids, costs: Sequence[ImageCost]) -> tuple[Ids, Ids]:
        """Tokens and labels with every image at its full length."""
        if self.vision is None:
            return ids, labels
        places = np.flatnonzero(ids == self._image_id)
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = [cost.tokens for cost in costs[: len(places)]]
        return np.repeat(ids, repeats), np.repeat(labels, repeats)

    def _cut(self, ids: Ids, labels: Ids, image_tokens: int) -> tuple[Ids, Ids, int]:
        """Tokens and labels within the limit, and how many tokens were too many."""
        most, kept = self.data.max_tokens, len(ids)
        if image_tokens > most:
            raise BadSample([f"its images alone are {image_tokens} tokens, more than data.max_tokens {most}"])
        labelled = np.flatnonzero(labels[1:most] != IGNORED)
        if kept > most:
            if not len(labelled):
                raise BadSample([f"cut to data.max_tokens {most}, nothing of an answer is left of its {kept} tokens"])
            # An image has no labels, so none is left in part.
            kept = int(labelled[-1]) + 2
        elif not len(labelled):
            raise BadSample(["the chat template gives its answers no tokens, so there is nothing to learn from it"])
        return ids[:kept], labels[:kept], len(ids) - kept

    def _cost(self, ids: Ids, labels: Ids, costs: Sequence[ImageCost]) -> Cost:
        image_tokens = int((ids == self.vision.token_id).sum()) if self.vision else 0
        left, seen = image_tokens, 0
        while left > 0:
            left, seen = left - costs[seen].tokens, seen + 1
        patches = sum(cost.patches for cost in costs[:seen])
        label_tokens = int((labels[1:] != IGNORED).sum())
        return Cost(len(ids) - image_tokens, image_tokens, len(ids), seen, patches, label_tokens)


def _token_range(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """The tokens that stand for any of the characters from `start` to before `end`."""
    first = next((token for at in range(start, end) if (token := encoding.char_to_token(at)) is not None), None)
    last = next((token for at in range(end - 1, start - 1, -1) if (token := encoding.char_to_token(at)) is not None), None)
    if first is None or last is None:
        return 0, 0
    # A character can be several tokens, of which the first is given.
    while last + 1 < len(encoding.ids) and (chars := encoding.token_to_chars(last + 1)) and chars[0] < end:
        last += 1
    return first, last + 1


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def open_encoder(recipe: Recipe, stage: Stage, notify: Callable[[str], None]) -> Encoder:
    """The encoder of a stage's data.

    Raises:
        UserError: the model's parts, its tokenizer or its chat template are not there or do not go together.
    """
    data = data_of(recipe, stage)
    config, folder = _model(recipe)
    tokenizer = load_tokenizer(tokenizer_folder(recipe))
    choose_template(tokenizer, data.chat_template)
    vision = open_vision(config, folder, tokenizer, data, notify)
    return Encoder(config, tokenizer, vision, data)


def _model(recipe: Recipe) -> tuple[PretrainedConfig, Path]:
    """The model's configuration, and the folder in which its image processor is described."""
    parts = recipe.model
    if isinstance(parts, Parts):
        vision, language = find_model(parts.vision), find_model(parts.language)
        layer, select = parts.vision_feature_layer, parts.vision_feature_select
        config: LlavaConfig = compose_llava(read_config(vision), read_config(language), layer, select, parts.projector)
        return config, vision
    folder = find_model(parts)
    return read_config(folder), folder
