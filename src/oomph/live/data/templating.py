"""Tokenizers and their chat templates: found, loaded, and one chosen."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from oomph.core.catalogue import find_model
from oomph.errors import UserError
from oomph.recipe import Parts, Recipe
from oomph.recipe.suggest import did_you_mean

Tokenizer = Any
"""A fast tokenizer of transformers, which is not annotated."""

SHIPPED = ("plain", "vicuna")
"""Templates by name. `plain` is an image and its caption, as LLaVA's projectors are trained; `vicuna` the conversations of
LLaVA-1.5 and MoE-LLaVA (LLaVA, llava/conversation.py: conv_llava_plain and conv_vicuna_v1)."""

Messages = list[dict[str, Any]]
"""Turns as chat templates take them: `role`, and `content` as a text or a list of parts."""

_LOCK = threading.Lock()
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_WAY_OUT = f"set data.chat_template to {', '.join(SHIPPED)} or a file with a Jinja template"


def tokenizer_folder(recipe: Recipe) -> Path:
    """The folder of the recipe's tokenizer: the one it names, else the model's, else the language part's.

    Raises:
        UserError: there is no such folder, or it holds no tokenizer.
    """
    model = recipe.model.language if isinstance(recipe.model, Parts) else recipe.model
    named = recipe.tokenizer or model
    path = Path(named).expanduser()
    folder = path if path.is_dir() else find_model(named)
    if not any((folder / name).is_file() for name in _FILES):
        raise UserError(f"the folder of {named!r} holds no tokenizer", "set `tokenizer` to a folder that holds one")
    return folder


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, without padding and cutting of its own.

    Raises:
        UserError: transformers cannot read it, or it cannot say which characters a token stands for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way
        raise UserError(f"transformers cannot read the tokenizer in {folder}: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {folder} does not say which characters a token stands for, as label masks need",
            "name a folder with a tokenizer.json",
        )
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def choose_template(tokenizer: Tokenizer, named: str | None) -> None:
    """Makes the chat template that data is rendered with the tokenizer's own.

    Args:
        tokenizer: for its own template.
        named: one of `SHIPPED`, or a file; None takes the tokenizer's.

    Raises:
        UserError: there is none, or it is no Jinja template.
    """
    if named is None:
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template", _WAY_OUT)
        template = str(tokenizer.get_chat_template())
    elif named in SHIPPED:
        template = _shipped(tokenizer, named)
    else:
        template = _read(Path(named).expanduser(), named)
    tokenizer.chat_template = template
    try:
        render([{"role": "user", "content": "."}, {"role": "assistant", "content": "."}], tokenizer)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is no Jinja template: {error.message}, line {error.lineno}", _WAY_OUT) from None
    except Exception:  # a template may want other contents than these; what it says of real samples is what counts
        pass


def _shipped(tokenizer: Tokenizer, name: str) -> str:
    """A shipped template, with the token that the tokenizer puts before any text."""
    text = resources.files("oomph.live.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    if "eos_token" in text and tokenizer.eos_token is None:
        raise UserError(
            f"data.chat_template {name} ends answers with the tokenizer's end of text, and it has none",
            "give the tokenizer an eos_token",
        )
    begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{- bos_token -}}\n" + text if begins else text


def _read(path: Path, named: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        guess = did_you_mean(named, SHIPPED)
        raise UserError(f"data.chat_template {named} cannot be read: {reason}{guess}", _WAY_OUT) from None


def is_marked(template: str) -> bool:
    """Whether a chat template says itself where the assistant speaks."""
    return re.search(r"{%-?\s*generation\s*-?%}", template) is not None


def render(messages: Messages, tokenizer: Tokenizer, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and where in it the tokenizer's template says that the assistant speaks.

    Args:
        messages: of `role` and `content`.
        tokenizer: for its chat template, and the special tokens that this names.
        prompt: whether the beginning of an answer follows.
    """
    with _LOCK:  # the places are kept in the compiled template while it is rendered
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=is_marked(tokenizer.chat_template),
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    texts, spans = rendered
    return texts[0], [(start, end) for start, end in spans[0] if start < end] if spans else []


def digest(tokenizer: Tokenizer) -> str:
    """A name for all that the tokenizer makes of texts, its chat template included."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, str(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
