"""Directories of other tools, each damaged in one way: a generator, which is the same each time."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One damage of a copy of a directory."""

    name: str
    source: str
    """Which directory: of a model in Hugging Face's form, ``ours`` or ``tokenizer``."""
    damage: Callable[[Path], None]
    says: tuple[str, ...]
    """Texts of which the error has to have one."""


# -------------------------------------------------------------------------------------------------------- the damages


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def _set(file: str, keys: str, value: Any) -> Callable[[Path], None]:
    def change(fields: dict[str, Any]) -> None:
        *parents, last = keys.split("/")
        for parent in parents:
            fields = fields[parent]
        fields[last] = value

    return lambda path: _edit(path / file, change)


def _special(file: str, how: str) -> Callable[[Path], None]:
    """Put something in the place of a file that is no regular file, or that has no end."""

    def damage(path: Path) -> None:
        at = path / file
        if at.is_file():
            at.unlink()
        {
            "fifo": lambda: os.mkfifo(at),
            "endless": lambda: at.symlink_to("/dev/zero"),
            "random": lambda: at.symlink_to("/dev/urandom"),
            "directory": at.mkdir,
            "itself": lambda: at.symlink_to(at),
            "nowhere": lambda: at.symlink_to(path / "nowhere"),
            "fifo_link": lambda: (os.mkfifo(path / "pipe"), at.symlink_to(path / "pipe")),
        }[how]()

    return damage


def _write(file: str, content: bytes | str) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: void((path / file).write_bytes(data))


def void(_: object) -> None:
    """Drop a result."""


FORMS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "text": b'"x"',
    "cut": b'{"a": 1, "b',
    "nan": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "too_large": b'{"a": 1e999}',
    "twice": b'{"a": 1, "a": 2}',
    "utf16": '{"a": 1}'.encode("utf-16"),
    "no_utf8": b'{"a": "\xff\xfe"}',
    "zero": b"\x00" * 64,
    "nested": b'{"a":' + b"[" * 100_000,
    "long": b'{"a": "' + b"x" * (70 * 2**20) + b'"}',
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
}
SPECIAL = ("fifo", "endless", "random", "directory", "itself", "nowhere", "fifo_link")
SIZES: tuple[Any, ...] = ("x", "2", [1], {"a": 1}, None, -1, 0, 10**9, 2**70, 1.5, True)
RATES: tuple[Any, ...] = ("x", [0.1], -0.1, 1, 2, True)


def _values(source: str, field: str, values: tuple[Any, ...]) -> Iterator[Case]:
    for value in values:
        says = (field.rpartition("/")[2], "is not the model that its config.json describes", "rope_theta")
        yield Case(f"{source}:{field}={value!r:.20}", source, _set("config.json", field, value), says)


def configurations() -> Iterator[Case]:
    """Of ``config.json``."""
    for field in ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions"):
        yield from _values("gpt2", field, SIZES)
    yield from _values("gpt2", "n_inner", ("x", [1], -1, 0, 10**9, 1.5, True))
    yield from _values("gpt2", "resid_pdrop", RATES)
    yield from _values("gpt2", "attn_pdrop", RATES)
    yield from _values("gpt2", "layer_norm_epsilon", ("x", [1], None, 0, -1e-5, True))
    yield from _values("gpt2", "activation_function", (3, "nosuch", ["gelu"], None, {}))
    yield from _values("gpt2", "tie_word_embeddings", ("no", 2, [1], {"a": 1}))
    yield from _values("gpt2", "model_type", (3, "nosuch", ["gpt2"], {}, None, True))
    yield from _values("gpt2", "architectures", ("GPT2LMHeadModel", [1], ["Nosuch"], {"a": 1}, 3))
    yield from _values("gpt2", "nosuch_field", (1, "x", [1], {"a": 1}))
    yield from _values("llama", "num_key_value_heads", ("x", 3, 0, 10**9, [1]))
    yield from _values("llama", "head_dim", ("x", 0, 13, 10**9, [1]))
    yield from _values("llama", "rope_parameters", ("x", [1], 3, {"rope_type": "nosuch"}, {"rope_theta": "x"}))
    yield from _values("llama", "rms_norm_eps", ("x", 0, None))
    yield from _values("bert", "num_labels", (10**9, "x", -1))
    yield from _values("bert", "type_vocab_size", (10**9, "x", -1))
    yield from _values("t5", "d_kv", (10**9, "x", 0, None))
    yield from _values("t5", "relative_attention_num_buckets", (10**9, "x", 0))


def files(file: str, source: str, forms: tuple[str, ...] = tuple(FORMS), special: tuple[str, ...] = SPECIAL) -> Any:
    """Of a whole JSON file."""
    for form in forms:
        yield Case(f"{source}:{file}:{form}", source, _write(file, FORMS[form]), (file,))
    for how in special:
        yield Case(f"{source}:{file}:{how}", source, _special(file, how), (file, "no checkpoint", "safetensors"))


# -------------------------------------------------------------------------------------------------------- safetensors

_FILE = "model.safetensors"
SHAPES: tuple[Any, ...] = ("x", None, [], [-1, 32], [1.5], [2**40, 2**40], [2**63], [3])
OFFSETS: tuple[Any, ...] = ("x", None, [], [0], [8, 0], [0, 2**63], [-8, 8], [4, 12])


def _tensors(change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> Callable[[Path], None]:
    """Change header and data of a file; a header may also be given as bytes."""

    def damage(path: Path) -> None:
        content = (path / _FILE).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = change(json.loads(content[8 : 8 + length]), content[8 + length :])
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (path / _FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return damage


def _entry(name: str, value: Any) -> Callable[[Path], None]:
    def change(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        first = next(key for key in header if key != "__metadata__")
        field, _, at = name.partition("/")
        if not field:
            header[first] = value
        elif at:
            header[first][field][int(at)] = value
        else:
            header[first][field] = value
        return header, data

    return _tensors(change)


def _shifted(by: int) -> Callable[[Path], None]:
    """Let the second tensor begin ``by`` bytes later: a hole, or below zero an overlap."""

    def change(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        second = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])[1]
        begin, end = header[second]["data_offsets"]
        header[second]["data_offsets"] = [begin + by, end + by]
        return header, data

    return _tensors(change)


def _cast(dtype: str) -> Callable[[Path], None]:
    """Call all tensors by another type of the same size."""

    def change(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        return {k: v if k == "__metadata__" else {**v, "dtype": dtype} for k, v in header.items()}, data

    return _tensors(change)


def safetensors() -> Iterator[Case]:
    """Of the header and the data of a single file."""
    twice = lambda h, d: (json.dumps(h).encode()[:-1] + b"," + json.dumps(h).encode()[1:], d)
    damages: dict[str, Callable[[Path], None]] = {
        **{f"dtype={v!r}": _entry("dtype", v) for v in ("F31", 3, None, "F64", "BF16", "F8_E4M3", "I32", "F4")},
        **{f"all_{kind}": _cast(kind) for kind in ("I32", "U32")},
        **{f"shape={v!r:.20}": _entry("shape", v) for v in SHAPES},
        **{f"offsets={v!r}": _entry("data_offsets", v) for v in OFFSETS},
        **{f"entry={v!r}": _entry("", v) for v in ({}, [], 3, None)},
        **{f"shifted_{by}": _shifted(by) for by in (4, 4096, -4, -4096)},
        "header_list": _tensors(lambda h, d: (list(h), d)),
        "header_empty": _tensors(lambda h, d: (b"", d)),
        "header_no_json": _tensors(lambda h, d: (b"{" * 64, d)),
        "header_no_utf8": _tensors(lambda h, d: (b'{"\xff": 1}', d)),
        "header_nested": _tensors(lambda h, d: (b'{"a":' + b"[" * 100_000, d)),
        "header_twice": _tensors(twice),
        "metadata_number": _tensors(lambda h, d: ({**h, "__metadata__": {"format": 3}}, d)),
        "metadata_list": _tensors(lambda h, d: ({**h, "__metadata__": [1]}, d)),
        "data_cut": _tensors(lambda h, d: (h, d[:-100])),
        "data_none": _tensors(lambda h, d: (h, b"")),
        "data_more": _tensors(lambda h, d: (h, d + b"\x00" * 64)),
        "tensor_missing": _tensors(lambda h, d: ({k: v for k, v in h.items() if "ln_f.weight" not in k}, d)),
        "tensor_more": _tensors(
            lambda h, d: (
                {**h, "more": {"dtype": "U8", "shape": [1], "data_offsets": [len(d), len(d) + 1]}},
                d + b"0",
            )
        ),
        "tensor_escape": _tensors(
            lambda h, d: ({**h, "\x1b[2J": {"dtype": "F32", "shape": [0], "data_offsets": [len(d), len(d)]}}, d)
        ),
        **{
            f"length_{n}": lambda path, n=n: void((path / _FILE).write_bytes(struct.pack("<Q", n) + b"{}"))
            for n in (0, 3, 2**27, 2**40, 2**63 - 1, 2**64 - 1)
        },
        **{f"bytes_{n}": _write(_FILE, b"\x00" * n) for n in (0, 1, 7, 8)},
        "page": _write(_FILE, "<html>404</html>" * 8),
    }
    for name, damage in damages.items():
        yield Case(
            f"{_FILE}:{name}", "gpt2", damage, (_FILE, "wte", "wpe", "config.json", "more", "ln_f", "x1b", "floating")
        )
    for how in SPECIAL:
        yield Case(f"{_FILE}:{how}", "gpt2", _special(_FILE, how), (_FILE,))


def index() -> Iterator[Case]:
    """Of the index of several shards."""
    file = "model.safetensors.index.json"
    shard = "model-00001-of-00004.safetensors"
    yield from files(file, "llama")
    for value in (None, [], 3, "x", {}, {"a": 1}, {"a": "../x"}, {"a": "/etc/passwd"}, {"a": "nosuch"}, {"a": ""}):
        says = (file, "nosuch", "outside", "table", "safetensors")
        yield Case(f"weight_map={value!r:.20}", "llama", _set(file, "weight_map", value), says)
    lost = _set(file, "weight_map/model.norm.weight", shard)
    yield Case("weight_map:lost", "llama", lost, (shard, "model.norm"))
    yield Case("weight_map:more", "llama", _set(file, "weight_map/more", shard), (shard, "more"))
    for how in SPECIAL:
        yield Case(f"shard:{how}", "llama", _special(shard, how), (shard,))


# --------------------------------------------------------------------------------------------------- ours, tokenizers

_OURS = "lightning_megatron.json"


def _ours(keys: str, value: Any) -> Callable[[Path], None]:
    """A field of our metadata, with the right checksum all the same."""

    def damage(path: Path) -> None:
        _set(_OURS, keys, value)(path)
        data = json.loads((path / _OURS).read_text())
        data.pop("crc32")
        data["crc32"] = zlib.crc32(json.dumps(data, sort_keys=True, default=str).encode())
        (path / _OURS).write_text(json.dumps(data, indent=2, default=str) + "\n")

    return damage


def ours() -> Iterator[Case]:
    """Of this package's own metadata."""
    yield from files(_OURS, "ours")
    changes: dict[str, tuple[Any, ...]] = {
        "model": ([], None, 3, {}, {"module": "Nosuch", "config": {}}),
        "model/module": (3, "Nosuch", None, []),
        "model/config": ([], None, 3, {}, {"a": 1}),
        "model/config/num_layers": (10**9, "x", -1, 0, None, [1], True, 3, 1.5),
        "model/config/hidden_size": (10**9, "x", -1, 33),
        "model/config/vocab_size": (10**9, "x", -1, 0),
        "model/config/activation": ("nosuch", 3),
        "model/hugging_face": ([], 3, "x"),
        "model/generation": ([1], 3, {"eos_token_id": "x"}),
        "model/lora": ({"rank": "x"}, {"a": 1}, [1], 3),
        "files": ([], None, {}, {"a": 1}, {"../x": {"size": 1, "crc32": 1}}),
        "format": (99, "3", None, 1, -1, True),
        "world_size": ("x", None, [1]),
        "layout": ([], None, 3),
        "tokenizer": ([], 3, {"source": 3}),
        "versions": ([], 3),
        "more": (1,),
    }
    for keys, values in changes.items():
        for value in values:
            name = f"{_OURS}:{keys}={value!r:.20}"
            says = (_OURS, "damaged", "holds a", "fields", keys.rpartition("/")[2])
            yield Case(name, "ours", _ours(keys, value), says)
    yield Case(f"{_OURS}:checksum", "ours", _set(_OURS, "world_size", 7), (_OURS,))
    for file in (".metadata", "__0_0.distcp"):
        for how in SPECIAL:
            yield Case(f"{file}:{how}", "ours", _special(file, how), (file,))
        for content in (b"", b"\x80\x04.", b"x" * 100):
            yield Case(f"{file}:{content!r:.12}", "ours", _write(file, content), (file,))


def tokenizers() -> Iterator[Case]:
    """Of a tokenizer, to be saved beside a model."""
    forms = tuple(form for form in FORMS if form not in ("nan", "infinite", "too_large", "twice", "digits", "long"))
    yield from files("tokenizer.json", "tokenizer", forms)
    fatal = ("cut", "utf16", "no_utf8", "zero", "nested", "empty", "list", "number", "text", "null")
    yield from files("tokenizer_config.json", "tokenizer", fatal, ("fifo", "endless", "random", "itself", "fifo_link"))
    for keys, values in {
        "model": (None, [], 3, {}),
        "model/type": ("Nosuch", 3),
        "model/vocab": (None, [], {"a": -1}, {"a": "x"}, {"a": 2**40}, {"a": 2**31}),
        "added_tokens": (3, [{"id": 10**8, "content": "<a>"}], [{"id": "x"}], [3]),
        "pre_tokenizer": ("x", {"type": "Nosuch"}),
        "post_processor": ("x", {"type": "Nosuch"}),
    }.items():
        for value in values:
            name = f"tokenizer.json:{keys}={value!r:.24}"
            yield Case(name, "tokenizer", _set("tokenizer.json", keys, value), ("tokenizer",))
    for value in (3, [1], {"a": 1}):
        damage = _set("tokenizer_config.json", "tokenizer_class", value)
        yield Case(f"tokenizer_config.json:tokenizer_class={value!r}", "tokenizer", damage, ("tokenizer",))


def generation() -> Iterator[Case]:
    """Of ``generation_config.json``."""
    yield from files("generation_config.json", "gpt2")
    for field, values in {"eos_token_id": ("x", [True], {"a": 1}, -1, 1.5), "bos_token_id": ("x", [1], -1)}.items():
        for value in values:
            damage = _set("generation_config.json", field, value)
            yield Case(f"generation:{field}={value!r}", "gpt2", damage, ("generation_config.json",))


def cases() -> list[Case]:
    """All of them."""
    whole = files("config.json", "gpt2")
    return [*configurations(), *whole, *safetensors(), *index(), *generation(), *ours(), *tokenizers()]
