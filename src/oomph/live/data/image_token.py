"""LLaVA's image tag as a token: the tokenizer and the model's configuration have to mean the same one.

A language model's tokenizer has no such token. Where the model has more embeddings than the tokenizer has tokens, the tag
becomes one more. Where it has none to spare, as SmolLM2, the last ordinary token makes room: its text is then written with
shorter ones. So the model keeps its shapes, and nothing that a text may hold stands for an image.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import AddedToken, PretrainedConfig

from oomph.errors import UserError
from oomph.live.data.samples import IMAGE_TAG
from oomph.live.data.templating import Tokenizer


def place_image_token(config: PretrainedConfig, tokenizer: Tokenizer) -> str:
    """Makes the tag a token of the tokenizer, and its number the image token of the configuration, both in place.

    Args:
        config: of a LLaVA.
        tokenizer: a fast one.

    Returns:
        The token that made room; empty where none had to.

    Raises:
        UserError: no token can make room.
    """
    size = int(config.get_text_config().vocab_size)
    known: dict[str, int] = tokenizer.get_vocab()
    displaced = ""
    if IMAGE_TAG not in known and max(known.values(), default=-1) + 1 < size:
        tokenizer.add_tokens([_tag()], special_tokens=True)
    elif known.get(IMAGE_TAG, size) >= size:
        displaced = _make_room(tokenizer, size)
    config.image_token_index = int(tokenizer.convert_tokens_to_ids(IMAGE_TAG))
    return displaced


def _tag() -> AddedToken:
    return AddedToken(IMAGE_TAG, special=True, normalized=False)


def _make_room(tokenizer: Tokenizer, size: int) -> str:
    """Gives the tag the largest number below `size` that no text needs: of a token that others can spell, or of none."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    names: dict[int, str] = {number: token for token, number in tokenizer.get_vocab().items()}
    template = tokenizer.chat_template or ""
    used = {*tokenizer.all_special_tokens, *(token for token in names.values() if token in template)}
    spare = _spare(content, names) - used
    free = (number for number in range(size - 1, -1, -1) if number not in names or names[number] in spare)
    number = next(free, None)
    if number is None:
        raise UserError(
            f"the tokenizer has no room for {IMAGE_TAG}: the model has {size} embeddings, and each is some other token's",
            f"name a tokenizer that has {IMAGE_TAG}",
        )
    _rename(content, names.get(number), number)
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    tokenizer.add_tokens([_tag()], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(IMAGE_TAG) != number:
        raise UserError(f"the tokenizer does not take {IMAGE_TAG} in the place of its token {number}", "name another tokenizer")
    return names.get(number, "")


def _spare(content: dict[str, Any], names: dict[int, str]) -> set[str]:
    """Tokens that a text can do without: those that pairs of shorter ones make, and added ones."""
    model, added = content["model"], {entry["content"] for entry in content["added_tokens"]}
    if model["type"] == "BPE":
        return added | {"".join(_pair(merge)) for merge in model["merges"]}
    if model["type"] == "Unigram":
        letters = {token for token in names.values() if len(token) == 1}
        return added | {token for token in names.values() if len(token) > 1 and letters.issuperset(token)}
    return added


def _rename(content: dict[str, Any], old: str | None, number: int) -> None:
    """Makes the tag of a token in a tokenizer's JSON, in place."""
    added = {entry["id"]: entry for entry in content["added_tokens"] if entry["content"] != IMAGE_TAG}
    ordinary = number not in added
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added[number] = {"id": number, "content": IMAGE_TAG, **flags, "special": True}
    content["added_tokens"] = [added[key] for key in sorted(added)]
    model = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        if number < len(vocabulary):
            vocabulary[number][0] = IMAGE_TAG
        return
    vocabulary.pop(IMAGE_TAG, None)
    if vocabulary.pop(old, None) is not None or ordinary:
        vocabulary[IMAGE_TAG] = number
    if "merges" in model:
        pairs = (_pair(merge) for merge in model["merges"])
        model["merges"] = [list(pair) for pair in pairs if old not in (*pair, "".join(pair))]


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
    return left, right
