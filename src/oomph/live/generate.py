"""Answers of a trained model: greedy, token by token, from prompts that are made as training made them.

A prompt is what stands before the labels of an answer when the conversation is encoded as a sample: the same text, the same
tokens, the same pixels. The most likely token is taken at each step, until one that ends answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from oomph.core.catalogue import find_model
from oomph.errors import UserError
from oomph.live.batch import Batch
from oomph.live.data.collating import Collator, Prepared
from oomph.live.data.encoding import Encoded, Encoder, open_encoder
from oomph.live.data.pictures import decode
from oomph.live.data.samples import IMAGE_TAG, BadSample, Sample, Turn
from oomph.live.export import SETTINGS, end_tokens
from oomph.live.model import read_config
from oomph.live.reading import read_weights
from oomph.live.step import IGNORED
from oomph.live.weights import reader_of
from oomph.recipe import Recipe

_GRIDS_OF_ONE_SIZE = ("llava", "internvl", "gemma3")
_LONGEST_ANSWER = 1024
_LONGEST_TEXT = 1 << 20
_BEGINNINGS = ("Yes", "It is", "A", "No", "The", "1")
_UNFINISHED = "\ufffd"
"""What decoding writes where a character's last bytes are still to come."""


class Answerer:
    """A trained model with all that it takes to ask it.

    Attributes:
        encoder: makes tokens and pixels as training did.
        collate: makes batches.
        room: tokens that a prompt and its answer may have.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder, device: torch.device) -> None:
        self.encoder, self._model, self._device = encoder, model, device
        self.room = room_of(encoder.config)
        self.collate = Collator(encoder.config, encoder.vision.token_id if encoder.vision else -1, 0)
        self._ends = frozenset(end_tokens(encoder, model.generation_config))

    def answers(
        self, prompts: Sequence[Prepared], limit: int, on_token: Callable[[list[int]], None] = lambda tokens: None
    ) -> list[list[int]]:
        """The tokens of each prompt's answer, without the one that ends it.

        Args:
            prompts: all of one length.
            limit: tokens that an answer has at most.
            on_token: told the first prompt's answer each time that it has grown.
        """
        batch = self.collate(prompts, self._model.dtype)
        del batch["labels"]
        inputs = {name: tensor.to(self._device) for name, tensor in batch.items()}
        found: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        with torch.inference_mode():
            while running and len(found[min(running)]) < limit:
                output = self._model(**inputs, use_cache=True, logits_to_keep=1)
                tokens = output.logits[:, -1].argmax(dim=-1)
                for row, token in enumerate(tokens.tolist()):
                    if row in running and token in self._ends:
                        running.remove(row)
                    elif row in running:
                        found[row].append(token)
                        if row == 0:
                            on_token(found[0])
                inputs = _next(inputs, tokens, output.past_key_values)
        return found

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without special ones."""
        return str(self.encoder.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _next(inputs: Batch, tokens: torch.Tensor, past: Any) -> Batch:
    """The inputs of the next step: the tokens, and whatever positions the model was given before."""
    following: Batch = {"input_ids": tokens[:, None], "past_key_values": past}
    if "position_ids" in inputs:
        following["position_ids"] = inputs["position_ids"][..., -1:] + 1
    return following


def open_answerer(name: str, images: int, notify: Callable[[str], None], encoder: Encoder | None = None) -> Answerer:
    """The model of a folder, on the GPU where there is one.

    Args:
        name: a folder that `save_model` or transformers wrote, or another name of a model that is here.
        images: that a conversation may have.
        notify: told in a sentence what is noteworthy and no mistake.
        encoder: the encoder, where it is open already.

    Raises:
        UserError: the folder holds no such model, or not all of it.
    """
    folder = find_model(name)
    if encoder is None:
        recipe = recipe_of(folder, images)
        encoder = open_encoder(recipe, recipe.stages[0], notify)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    auto = reader_of(read_config(folder))
    found = read_weights(auto, folder, torch.float32 if device.type == "cpu" else "auto")
    if found.model is None:
        raise UserError(found.problems, "name a folder that holds a whole model")
    model: Any = found.model
    return Answerer(model.to(device).eval(), encoder, device)


def recipe_of(folder: Path, images: int, **data: Any) -> Recipe:
    """A recipe whose data are made as those that the folder's model was trained on.

    Args:
        folder: the model's.
        images: that a conversation may have.
        data: other settings of the recipe's `data`.

    Raises:
        UserError: what the folder says about its training cannot be read.
    """
    limits = {"image_aspect_ratio": _aspect(read_config(folder), folder)} | _settings(folder)
    limits |= {"max_tokens": _LONGEST_TEXT, "images_per_sample": images, "image_tokens_count": True, **data}
    stage = {"name": "answer", "train": {"language": 1e-5}, "effective_batch": 1}
    content = {"name": folder.name, "model": str(folder), "data": limits, "hardware": {"gpu": "T4"}, "stages": [stage]}
    try:
        return Recipe.model_validate(content)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / SETTINGS} is not what oomph writes: {reason}") from None


def room_of(config: PretrainedConfig) -> int:
    """The tokens that a model's positions reach to."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or _LONGEST_TEXT)


def _settings(folder: Path) -> dict[str, Any]:
    """What the model was trained with; nothing where the folder is not ours."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        settings: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what oomph writes") from None
    return {name: value for name, value in settings.items() if value is not None}


def _aspect(config: Any, folder: Path) -> str:
    """How a model that others saved takes pictures."""
    if getattr(config, "vision_config", None) is not None and config.model_type not in _GRIDS_OF_ONE_SIZE:
        return "any"
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                return "pad" if content.get("image_processor", content).get("do_pad") else "square"
            except (OSError, ValueError, AttributeError):
                continue  # the processor's own reader says what is wrong with it
    return "square"


def prompt_before(encoded: Encoded, start: int, images: Sequence[dict[str, torch.Tensor]], name: str = "") -> Prepared:
    """What stands before a place of an encoded conversation, ready for the model.

    Args:
        encoded: the conversation.
        start: the place.
        images: the tensors of all of its images; those that stand before the place are taken.
        name: for messages.
    """
    ids = torch.from_numpy(encoded.ids[:start])
    return Prepared(-1, name, ids, torch.full_like(ids, IGNORED), tuple(images), encoded.cost)


def answer_starts(encoded: Encoded) -> list[tuple[int, int]]:
    """Where each answer of an encoded conversation begins and ends."""
    labelled = np.concatenate([[False], encoded.labels != IGNORED, [False]])
    edges = np.flatnonzero(labelled[1:] != labelled[:-1])
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


class Conversation:
    """A conversation that goes on. Its pictures belong to the first question.

    Args:
        answerer: who answers.
        images: files.

    Raises:
        UserError: a picture cannot be read.
    """

    def __init__(self, answerer: Answerer, images: Sequence[Path] = ()) -> None:
        self._answerer, self._turns, self._names = answerer, list[Turn](), tuple(str(path) for path in images)
        vision = answerer.encoder.vision
        try:
            pictures = [decode(path) for path in images]
            self._sizes = [(picture.height, picture.width) for picture in pictures]
            self._images = [vision.tensors(picture) for picture in pictures] if vision else []
        except BadSample as error:
            raise UserError(error.problems, "--image names a picture file") from None

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """The answer to a question. It becomes part of the conversation.

        Args:
            text: the question. Where it is the first and names no place for the pictures, they stand before it.
            write: told each piece of the answer as it comes.

        Raises:
            UserError: the conversation is too long, or it and the pictures do not go together.
        """
        first = not self._turns and IMAGE_TAG not in text
        question = Turn("user", f"{IMAGE_TAG}\n" * len(self._names) * first + text)
        prompt = self._prompt([*self._turns, question])
        shown = ""

        def on_token(tokens: list[int]) -> None:
            nonlocal shown
            grown = self._answerer.text(tokens).lstrip()
            if not grown.endswith(_UNFINISHED) and len(grown) > len(shown):
                write(grown[len(shown) :])
                shown = grown

        limit = min(_LONGEST_ANSWER, self._answerer.room - len(prompt.ids))
        [tokens] = self._answerer.answers([prompt], limit, on_token)
        answer = self._answerer.text(tokens).strip()
        self._turns += [question, Turn("assistant", answer or " ")]
        return answer

    def _prompt(self, turns: Sequence[Turn]) -> Prepared:
        """The conversation up to where any answer begins.

        A token may hold the last characters of the template and the first of an answer, and is the answer's then. So what
        answers of several beginnings leave is taken.
        """
        encoder, room = self._answerer.encoder, self._answerer.room
        samples = [Sample("", self._names, (*turns, Turn("assistant", answer))) for answer in _BEGINNINGS]
        try:
            encoder.check(samples[0])
            prompts = []
            for encoded in encoder.encode(samples, [self._sizes] * len(samples)):
                if isinstance(encoded, BadSample):
                    raise encoded
                prompts.append(prompt_before(encoded, answer_starts(encoded)[-1][0], self._images))
            shortest = min(prompts, key=lambda prompt: len(prompt.ids))
            if len(shortest.ids) >= room:
                raise BadSample([f"it is {len(shortest.ids)} tokens long, and the model takes {room} with its answer"])
        except BadSample as error:
            raise UserError([f"the conversation: {problem}" for problem in error.problems]) from None
        return shortest
