"""Samples side by side in one micro-batch: padded on the right, without a mask, as the traced batches are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from oomph.core.layout import Shape
from oomph.live.batch import Batch, text_inputs
from oomph.live.data.encoding import Cost
from oomph.live.step import IGNORED


@dataclass(frozen=True)
class Prepared:
    """A sample that is ready to be trained on.

    Attributes:
        index: its number in the data set.
        name: where it comes from, for messages.
        ids: [tokens], with as many image tokens as its images have.
        labels: [tokens].
        images: the tensors of each image, in float32.
        cost: what it costs.
    """

    index: int
    name: str
    ids: Tensor
    labels: Tensor
    images: tuple[dict[str, Tensor], ...]
    cost: Cost

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        tensors = [self.ids, self.labels, *(tensor for image in self.images for tensor in image.values())]
        return sum(tensor.nbytes for tensor in tensors)


class Collator:
    """Makes micro-batches, with the inputs that the tracer gives the model.

    Args:
        config: the model's configuration.
        image_token: the model's id of an image token; -1 for a text model.
        padding: the token that short samples are filled up with.
    """

    def __init__(self, config: PretrainedConfig, image_token: int, padding: int) -> None:
        self._image_token, self._padding = image_token, padding
        self._inputs = frozenset(text_inputs(config, Shape(1, 1, 0), None))
        vision: Any = getattr(config, "vision_config", None)
        merge = getattr(vision, "spatial_merge_size", 1)
        self._merge = int(merge if isinstance(merge, int) else merge[0])

    def __call__(self, samples: Sequence[Prepared], dtype: torch.dtype = torch.float32, tokens: int = 0) -> Batch:
        """The micro-batch of some samples, in host memory.

        Args:
            samples: at least one.
            dtype: of the pixels.
            tokens: to which short samples are filled up at the least.

        Returns:
            `input_ids` and `labels`, [samples, tokens of the longest or more], the images' tensors one after the other, and
            what else the model reads. Samples without images add nothing to the images' tensors.
        """
        batch: Batch = {
            "input_ids": _padded([sample.ids for sample in samples], self._padding, tokens),
            "labels": _padded([sample.labels for sample in samples], IGNORED, tokens),
        }
        length = batch["input_ids"].shape[1]
        if "position_ids" in self._inputs:
            positions = [self._positions(sample, length) for sample in samples]
            batch["position_ids"] = torch.stack(positions, dim=1)
        if "token_type_ids" in self._inputs:
            batch["token_type_ids"] = (batch["input_ids"] == self._image_token).long()
        images = [image for sample in samples for image in sample.images]
        for name in images[0] if images else ():
            joined = torch.cat([image[name] for image in images])
            batch[name] = joined.to(dtype) if joined.is_floating_point() else joined
        return batch

    def _positions(self, sample: Prepared, tokens: int) -> Tensor:
        """Positions in time, row and column, [3, tokens]: a text goes on behind the largest of an image before it.

        As Qwen2-VL has them (transformers, modeling_qwen2_vl.py: get_rope_index).
        """
        pieces, at, start = [], 0, 0
        for image in sample.images:
            rows, columns = (int(side) // self._merge for side in image["image_grid_thw"][0, 1:])
            first = at + int((sample.ids[at:] == self._image_token).long().argmax())
            pieces.append(torch.arange(start, start + first - at).expand(3, -1))
            start += first - at
            row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            pieces.append(torch.stack([torch.zeros_like(row), row, column]).flatten(1) + start)
            at, start = first + rows * columns, start + max(rows, columns)
        pieces.append(torch.arange(start, start + tokens - at).expand(3, -1))
        return torch.cat(pieces, dim=1)


def _padded(rows: Sequence[Tensor], value: int, tokens: int) -> Tensor:
    length = max(tokens, *map(len, rows))
    padded = rows[0].new_full((len(rows), length), value)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded
