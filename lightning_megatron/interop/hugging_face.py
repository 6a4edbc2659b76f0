"""Directories of Hugging Face: reading all of a model or one rank's part, and writing one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.checkpoint.publish import partial_path, publish, remove
from lightning_megatron.errors import CheckpointError
from lightning_megatron.interop.architecture import (
    Architecture,
    architecture,
    architecture_for,
    without_copies,
)
from lightning_megatron.interop.config_fields import check_class, check_fields, check_sizes, contradiction, structure
from lightning_megatron.interop.core_model import VOCABULARY, CoreSpec, Identity
from lightning_megatron.interop.generation_settings import GENERATION_FILE, ROLES, align, read_generation, within
from lightning_megatron.interop.mapping import Entry, check_names, entries
from lightning_megatron.interop.resized import ResizedTensor, resized_to, tokens_of
from lightning_megatron.interop.safetensors_files import (
    SafetensorsWriter,
    StoredTensor,
    TensorSpec,
    open_directory,
    parse_size,
)
from lightning_megatron.interop.shapes import check_stored, check_type, core_shape
from lightning_megatron.interop.sharding import pieces
from lightning_megatron.json_files import read_object
from lightning_megatron.lora import is_adapter
from lightning_megatron.models.config import TransformerModelConfig

CONFIG_FILE = "config.json"
_LAYERS = ("n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model"),
)


@dataclass(frozen=True)
class HuggingFaceDirectory:
    """A model that ``save_pretrained`` of transformers wrote."""

    path: Path
    architecture: Architecture
    theirs: Mapping[str, Any]
    """Its ``config.json``."""
    config: Any
    """Ours."""
    tensors: Mapping[str, StoredTensor | ResizedTensor]
    """By the names of this version of transformers."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Its ``generation_config.json``, if it has one."""
    tokenizer: Any = None
    """The one whose tokens the vocabulary was resized for."""

    @classmethod
    def open(
        cls, path: str | Path, *, vocab_size: int | None = None, tokenizer: Any = None, **changes: Any
    ) -> HuggingFaceDirectory:
        """Read the configuration and all headers, and no tensor.

        Args:
            vocab_size: resize the vocabulary to so many tokens; see :mod:`lightning_megatron.interop.resized`.
            tokenizer: resize it to those of this one, if it has more: a directory, or an object of transformers.
            changes: fields of our configuration to set otherwise.

        Raises:
            CheckpointError: no directory of Hugging Face, an unsupported architecture or choice, a field that is not
                known, or shards that are missing, cut short, or do not have the configuration's tensors and shapes.
        """
        path = Path(path)
        theirs = _read_config(path)
        found = architecture(theirs.get("model_type", ""), where=path / CONFIG_FILE)
        stored = open_directory(path)
        tensors = {name: stored[old] for name, old in found.canonical(stored).items()}
        try:
            check_class(theirs, found.classes)
            check_fields(theirs, found.reads, found.only)
            check_sizes(theirs, len(tensors), _LAYERS)
            full = _with_defaults(theirs)
            tensors = without_copies(found, bool(full.get("tie_word_embeddings")), tensors)
            config = found.read(full, tensors).replace(**changes)
            check_sizes({"num_layers": config.pipeline_layers}, len(tensors), _LAYERS)
        except CheckpointError:
            raise
        except Exception as error:  # transformers raises many kinds of its own for values of another type
            raise contradiction(path / CONFIG_FILE, theirs, error) from error
        generation = read_generation(path) if found.generates else {}
        opened = cls(path, found, theirs, config, tensors, generation)
        ignored = [name for name in tensors if found.ignores(config, name)]
        try:
            check_names(found.table(config), tensors, ignored, where=path)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {CONFIG_FILE} says {structure(theirs)}.") from None
        opened._check_shapes()
        return opened._resized(vocab_size, tokenizer)

    def _resized(self, vocab_size: int | None, tokenizer: Any) -> HuggingFaceDirectory:
        known = self.config.vocab_size
        rows = known if vocab_size is None else resized_to(vocab_size, known, self.path)
        if tokenizer is not None:
            rows = max(rows, tokens_of(tokenizer))
        resized = replace(self, tokenizer=tokenizer)
        if rows == known:
            return resized
        vocabularies = {name for entry in self._entries.values() if entry.core in VOCABULARY for name in entry.theirs}
        tensors = {n: ResizedTensor(t, rows) if n in vocabularies else t for n, t in self.tensors.items()}
        return replace(resized, config=self.config.replace(vocab_size=rows), tensors=tensors)

    @property
    def added_tokens(self) -> int:
        """Tokens that the files do not have."""
        resized = [t for t in self.tensors.values() if isinstance(t, ResizedTensor)]
        return resized[0].rows - resized[0].stored.shape[0] if resized else 0

    def _check_shapes(self) -> None:
        made = []
        for entry in self._entries.values():
            for name in entry.theirs:
                check_type(self.tensors[name].dtype, name, self.path)
            rows = [self.tensors[name].shape[:1] for name in entry.theirs]
            if entry.core in VOCABULARY and all(rows):
                entry.transform.core_rows([row[0] for row in rows])  # names vocab_size
            shape = core_shape(self.config, entry.core)
            if shape is not None:
                made.append((entry.theirs, entry.transform.shapes(shape)))
        check_stored(made, self.tensors, self.path)

    @property
    def identity(self) -> Identity:
        """Which model it is."""
        return Identity(self.config, self.theirs, self.path, generation=self.generation)

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return {entry.core: entry for entry in entries(self.architecture.table(self.config), self.tensors)}

    @cached_property
    def specs(self) -> dict[str, CoreSpec]:
        """Whole tensors in megatron-core's form.

        Raises:
            CheckpointError: a vocabulary that is not ``vocab_size``.
        """
        return {
            name: CoreSpec(
                entry.transform.core_shape([self.tensors[their].shape for their in entry.theirs]),
                self.tensors[entry.theirs[0]].dtype,
            )
            for name, entry in self._entries.items()
        }

    def read(self, name: str) -> Tensor:
        """One whole tensor in megatron-core's form."""
        spec = self.specs[name]
        into = torch.empty(spec.shape, dtype=spec.dtype)
        self._read(name, tuple(slice(0, size) for size in spec.shape), into)
        return into

    def _read(self, name: str, place: tuple[slice, ...], into: Tensor) -> None:
        entry = self._entries[name]
        entry.transform.read([self.tensors[their] for their in entry.theirs], place, into)

    @torch.no_grad()
    def fill(self, chunks: Iterable[Any]) -> None:
        """Fill this rank's chunks, reading no more than they hold. Heads that the directory lacks stay as they are.

        Raises:
            CheckpointError: a tensor of another shape than the model's.
        """
        optional = {core for rule in self.architecture.table(self.config) if rule.optional for core, _ in rule.expand()}
        for chunk in chunks:
            for piece in pieces(chunk):
                if is_adapter(piece.name) or (piece.name in optional and piece.name not in self._entries):
                    continue
                if piece.name not in self._entries:
                    raise CheckpointError(
                        f"The model has {piece.name}, which no {self.architecture.model_type} of Hugging Face has."
                    )
                skip = piece.name in VOCABULARY  # padding depends on the layout
                shape, wanted = self.specs[piece.name].shape, piece.shape or ()
                if shape[skip:] != wanted[skip:]:
                    raise CheckpointError(
                        f"{', '.join(self._entries[piece.name].theirs)} in {self.path} make {piece.name} of the shape "
                        f"{list(shape)}, but the configuration says {list(wanted)}. Is {CONFIG_FILE} of another model?"
                    )
                self._read(piece.name, piece.place, piece.tensor)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; give a directory with {CONFIG_FILE} and safetensors, as save_pretrained of transformers "
            "writes it. Names on the hub are not fetched: download first."
        )
    try:
        return read_object(path / CONFIG_FILE)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} has no {CONFIG_FILE}, so it is no directory of Hugging Face. Give another."
        ) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path / CONFIG_FILE} is no JSON of a configuration: {error}. Fetch it again."
        ) from error


def _with_defaults(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """All fields, with the values that transformers gives to those that a file leaves out."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[theirs["model_type"]]
    found: dict[str, Any] = kind.from_dict(dict(theirs)).to_dict()
    return found


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """How a directory of Hugging Face is written."""

    max_shard_size: int | str = "200MB"
    model_type: str | None = None
    """Which architecture, if several have the model: a Llama can be saved as ``"mistral"``. ``None`` is what the model
    was, or else the first that fits."""
    dtype: torch.dtype | None = None
    """``None`` keeps that of each tensor."""
    tokenizer: Any = None
    """A tokenizer of transformers, or where to load one from. ``None`` is that of the directory that the model came
    from, or that the run of a checkpoint had, if it is still there."""


class HuggingFaceWriter:
    """Streams a model into a directory that ``AutoModel...from_pretrained`` loads. It appears when it is whole.

    Args:
        path: does not exist, or is empty.
        specs: of the model's tensors, in megatron-core's form.

    Raises:
        CheckpointError: something is at the path, or no architecture of Hugging Face has the model.
        ValueError: ``max_shard_size`` is no size.
    """

    def __init__(self, path: Path, identity: Identity, specs: Mapping[str, CoreSpec], options: SaveOptions) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path} exists already. Give a new or an empty directory.")
        self._path, self._partial = path, partial_path(path)
        self._identity, self._options = identity, options
        origin = identity.hugging_face.get("model_type")
        self._architecture = chosen_architecture(identity.config, options.model_type, origin)
        heads = [entry.core for entry in entries(self._architecture.table(identity.config))]
        self.entries = [e for e in entries(self._architecture.table(identity.config)) if e.core in specs]
        """What is to come, in order."""
        lost = sorted(set(heads) - set(specs)) or sorted(set(specs) - set(heads))
        if lost:
            raise CheckpointError(
                f"The tensors are not those of a {self._architecture.model_type} of this configuration: "
                f"{', '.join(lost[:5])} {'is' if len(lost) == 1 else 'are'} "
                f"{'missing' if lost[0] in heads else 'unknown'}."
            )
        planned = [
            TensorSpec(name, shape, options.dtype or specs[entry.core].dtype)
            for entry in self.entries
            for name, shape in zip(entry.theirs, entry.transform.shapes(specs[entry.core].shape), strict=True)
        ]
        most = parse_size(options.max_shard_size)
        remove(self._partial)
        self._partial.mkdir(parents=True)
        self._tensors = SafetensorsWriter(self._partial, planned, most)
        self._dtype = planned[0].dtype

    def __enter__(self) -> HuggingFaceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._tensors.__exit__(kind, error, traceback)
            if kind is None:
                self._write_the_rest()
                publish(self._partial, self._path)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def put(self, entry: Entry, core: Tensor) -> None:
        """The next tensor, whole, in megatron-core's form."""
        for name, part in zip(entry.theirs, entry.transform.to_theirs(core), strict=True):
            self._tensors.put(name, part)

    def _write_the_rest(self) -> None:
        from transformers import CONFIG_MAPPING, GenerationConfig

        identity, tokenizer = self._identity, self._tokenizer()
        theirs = _fields(identity, self._architecture)
        theirs["dtype"] = str(self._dtype).removeprefix("torch.")
        generation = dict(identity.generation)
        if not generation and identity.files is not None and identity.hugging_face:
            generation = read_generation(identity.files)
        if tokenizer is not None and not identity.hugging_face:
            theirs |= {role: getattr(tokenizer, role) for role in ROLES}  # defaults of their class are another model's
        config = CONFIG_MAPPING[self._architecture.model_type].from_dict(dict(theirs))
        for role in ROLES:  # a default of their class may be none of this vocabulary
            default = getattr(config, role, None)
            if role not in theirs and isinstance(default, int) and default >= identity.config.vocab_size:
                theirs[role] = None
        within(theirs, identity.config.vocab_size)
        for role in set(ROLES) & set(theirs):
            setattr(config, role, theirs[role])
        if not generation and self._architecture.generates:
            generation = GenerationConfig.from_model_config(config).to_diff_dict()
        if tokenizer is not None and identity.hugging_face:
            align(theirs, generation, tokenizer)
        within(generation, identity.config.vocab_size)
        (self._partial / CONFIG_FILE).write_text(json.dumps(theirs, indent=2) + "\n")
        if self._architecture.generates:
            (self._partial / GENERATION_FILE).write_text(json.dumps(generation, indent=2) + "\n")

    def _tokenizer(self) -> Any:
        source = self._options.tokenizer
        if source is None and not self._identity.hugging_face:
            source = self._identity.files  # of a run's; its special tokens are in no configuration yet
        if source is not None:
            from lightning_megatron.data.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(source)
            tokenizer.save_pretrained(self._partial)
            return tokenizer
        if self._identity.files is not None:
            for name in _TOKENIZER_FILES:
                if (self._identity.files / name).is_file():
                    shutil.copy(self._identity.files / name, self._partial)
        return None


def chosen_architecture(config: TransformerModelConfig, asked: str | None, origin: str | None) -> Architecture:
    """The one asked for, or that the model came from if it still fits, or the first that fits."""
    if asked is None and origin is not None:
        try:
            return architecture_for(config, origin)
        except CheckpointError:
            pass  # the model has been changed since
    if asked is not None:
        architecture(asked)
    return architecture_for(config, asked)


def _fields(identity: Identity, chosen: Architecture) -> dict[str, Any]:
    """A ``config.json``: the one that the model came from, but for what has changed; or one of our fields."""
    fields: dict[str, Any] = chosen.write(identity.config)
    origin = dict(identity.hugging_face)
    if origin.get("model_type") == chosen.model_type:
        full = _with_defaults(origin)
        before = chosen.write(
            chosen.read(full, [name for e in entries(chosen.table(identity.config)) for name in e[1]])
        )
        changed = {name: value for name, value in fields.items() if before[name] != value}
        if origin.get("tie_word_embeddings") and not fields.get("tie_word_embeddings", True):
            # It held two different tensors. A T5 takes its scale from the same field, unless the other is there.
            told = ("tie_word_embeddings", "scale_decoder_outputs")
            changed |= {name: fields[name] for name in told if name in fields}
        fields = origin | changed
    return {**fields, "model_type": chosen.model_type, "architectures": [chosen.class_name(identity.config)]}
