"""What a closed form is made from and made for, and the cache on disk: the meeting point of planner and tracer."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Protocol

from oomph.core.closed_form import ClosedForm
from oomph.records import Attention, Precision, Record

_LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True)
class FormKey(Record):
    """Everything that a trace depends on. Paths name folders that hold a ``config.json``.

    `shape` is (samples, tokens, images) for a model whose sizes are not closed, else None; `one_sample` and `images` are the
    family of shapes, as `closed_form.Family` has them. `experts`, `balance`, `lora` and `quantization` are the stage's
    sections as JSON, empty where it has none. `periodic` says of a key with a shape that the model's layers are known to
    repeat, so that not all have to be traced.
    """

    model: str | None
    vision: str | None
    language: str | None
    projector: str | None
    vision_feature_layer: int
    vision_feature_select: str
    experts: str
    balance: str
    lora: str
    quantization: str
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    attention: Attention
    loss: str
    optimizer: str
    checkpointing: str
    vision_checkpointing: str
    precision: Precision
    capability: tuple[int, ...]
    image_size: tuple[int, ...]
    one_sample: bool
    images: int
    shape: tuple[int, ...] | None = None
    periodic: bool = False

    def configurations(self) -> dict[str, Any]:
        """The contents of the configurations that the key names.

        Raises:
            OSError, ValueError: a configuration cannot be read.
        """
        folders = [folder for folder in (self.model, self.vision, self.language) if folder is not None]
        return {folder: json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")) for folder in folders}

    def libraries(self) -> tuple[str, ...]:
        """The libraries whose code runs in the trace."""
        adapters = ("peft",) if self.lora or self.quantization else ()
        quantized = ("bitsandbytes",) if self.quantization or "8bit" in self.optimizer else ()
        return (*_LIBRARIES, *adapters, *quantized)

    def digest(self) -> str:
        """A name for what is made from the key: it changes with configurations, libraries and our own code."""
        content = self.configurations()
        renamed = {**self.to_json(), **{name: content.get(getattr(self, name)) for name in ("model", "vision", "language")}}
        text = json.dumps([renamed, versions(self.libraries()), code_digest()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Traced:
    """A closed form with what else the tracer learned. `form` is None where sizes are not closed and no shape was given."""

    form: ClosedForm | None
    image_tokens: int
    how: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        form = None if self.form is None else self.form.to_json()
        return {"form": form, "image_tokens": self.image_tokens, "how": self.how}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Traced:
        """What `to_json` wrote."""
        form = None if data["form"] is None else ClosedForm.from_json(data["form"])
        return cls(form, data["image_tokens"], data["how"])


class Source(Protocol):
    """Where the planner gets its closed forms."""

    def traced(self, key: FormKey) -> Traced:
        """The form of a key, made if need be."""
        ...

    def prepare(self, keys: Sequence[FormKey]) -> None:
        """Makes several at once, so that they can be made side by side."""
        ...


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """The versions of libraries whose code is traced, without importing them; of one that is missing none."""
    return {name: version for name in libraries if (version := _version(name))}


@functools.cache
def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def code_digest() -> str:
    """A digest of our own code: another tracer makes other traces."""
    root = resources.files("oomph")
    digest = hashlib.sha256()
    for folder in ("core", "live", "recipe"):
        for path in sorted(Path(str(root / folder)).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where traces are kept: ``$XDG_CACHE_HOME/oomph/traces``, by default in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "oomph" / "traces"


class CachedForms:
    """A source that keeps what it makes on disk. A file that is not whole is made again, never trusted.

    Args:
        make: makes the form of a key; called where the cache has none.
        make_all: makes several and calls its second argument with each as it is done.
        notify: told in a sentence what is being done.
        folder: the cache; by default `cache_folder`.
    """

    def __init__(
        self,
        make_all: Callable[[Sequence[FormKey], Callable[[FormKey, Traced], None]], None],
        notify: Callable[[str], None] = lambda sentence: None,
        folder: Path | None = None,
    ) -> None:
        self._make_all, self._notify = make_all, notify
        self._folder = cache_folder() if folder is None else folder
        self._known: dict[FormKey, Traced] = {}

    def traced(self, key: FormKey) -> Traced:
        """The form of a key: remembered, read or made."""
        self.prepare([key])
        return self._known[key]

    def prepare(self, keys: Sequence[FormKey]) -> None:
        """Reads the forms of several keys, and makes those that the cache lacks."""
        missing = []
        for key in dict.fromkeys(keys):
            if key not in self._known:
                found = self._read(key)
                if found is None:
                    missing.append(key)
                else:
                    self._known[key] = found
        if missing:
            self._make_all(missing, self._keep)

    def _keep(self, key: FormKey, traced: Traced) -> None:
        self._known[key] = traced
        self._write(key, traced)

    def _path(self, key: FormKey) -> Path:
        return self._folder / f"{key.digest()}.json"

    def _read(self, key: FormKey) -> Traced | None:
        try:
            checksum, _, body = self._path(key).read_text(encoding="utf-8").partition("\n")
        except (OSError, UnicodeDecodeError):
            return None
        if hashlib.sha256(body.encode()).hexdigest() != checksum:
            self._notify("a cached trace is damaged; tracing again")
            return None
        try:
            return Traced.from_json(json.loads(body))
        except (ValueError, TypeError, KeyError):
            return None

    def _write(self, key: FormKey, traced: Traced) -> None:
        """Writes beside the final name and renames, so that nobody reads half a file. A full disk costs the cache only."""
        body = json.dumps(traced.to_json(), separators=(",", ":"))
        temporary = ""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._folder, suffix=".part", delete=False, encoding="utf-8") as file:
                temporary = file.name
                file.write(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
            os.replace(temporary, self._path(key))
            temporary = ""
        except OSError as error:
            self._notify(f"the trace is not kept: {error.strerror or error}")
        finally:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
