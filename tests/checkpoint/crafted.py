"""Pickles that try to run code, to change what is loaded already, or to use up the memory, and files that hold them."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from lightning_megatron.checkpoint.metadata import FILE

FIRED: list[object] = []
"""What a pickle that runs appends to."""


def fire(*args: object, **kwargs: object) -> object:
    """What crafted pickles call."""
    FIRED.append(args)
    return args


class Fires:
    """Each way in which unpickling may reach an object of a class."""

    def __new__(cls, *args: object, **kwargs: object) -> Fires:
        fire("new")
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        fire("init")

    def __setstate__(self, state: object) -> None:
        fire("setstate")

    def __call__(self, *args: object) -> None:
        fire("call")


HERE = __name__


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _stack_global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


_DICT = b"}" + _text("crafted") + b"K\x01s"
"""``{"crafted": 1}``."""


def pickles() -> Iterator[tuple[str, bytes]]:
    """Crafted pickles by name, each of which must end in an error (or load as plain data) and call nothing."""
    head = b"\x80\x02"
    yield from ((name, head + body + b".") for name, body in _calls())
    yield from ((name, head + body + b".") for name, body in _attributes())
    yield from ((name, head + body) for name, body in _malformed())


def _calls() -> Iterator[tuple[str, bytes]]:
    ours = _global(HERE, "fire")
    kind = _global(HERE, "Fires")
    yield "reduce", ours + b")R"
    yield "reduce, nested", ours + ours + b")R\x85R"
    yield "reduce in a key", b"}" + ours + b")R" + b"K\x01s"
    yield "reduce in a tuple of a list", b"](" + ours + b")R" + b"te"
    yield "stack global", b"\x8c\x05tests\x94" + _stack_global(HERE, "fire") + b")R"
    yield "dotted name", _stack_global(HERE, "Fires.__call__") + kind + b"\x85R"
    yield "global from the memo", _text(HERE) + b"q\x00" + _text("fire") + b"q\x01" + b"h\x00h\x01\x93)R"
    yield "inst", b"(i" + f"{HERE}\nFires\n".encode()
    yield "inst of a function", b"(K\x01i" + f"{HERE}\nfire\n".encode()
    yield "obj", b"(" + kind + b"o"
    yield "obj of a function", b"(" + ours + b"K\x01o"
    yield "newobj", kind + b")\x81"
    yield "newobj_ex", kind + b")}\x92"
    yield "newobj and build", kind + b")\x81}b"
    yield "persistent id", b"Pcrafted\n"
    yield "binary persistent id", _text("crafted") + b"Q"
    yield "binary persistent id of a call", ours + b")RQ"
    yield "persistent storage of another class", b"(" + _text("storage") + kind + _text("0") + _text("cpu") + b"K\x01tQ"
    yield "extension 1", b"\x82\xf0"
    yield "extension 2", b"\x83\xf0\xf0"
    yield "extension 4", b"\x84\xf0\xf0\xf0\x0f"
    for module, name in (
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("__builtin__", "eval"),
        ("builtins", "__import__"),
        ("builtins", "getattr"),
        ("builtins", "setattr"),
        ("builtins", "open"),
        ("operator", "attrgetter"),
        ("functools", "partial"),
        ("importlib", "import_module"),
        ("runpy", "run_path"),
        ("pickle", "loads"),
        ("_pickle", "loads"),
        ("codecs", "open"),
        ("shutil", "rmtree"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.serialization", "add_safe_globals"),
        ("torch.jit", "load"),
        ("torch._utils", "_import_dotted_name"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("pathlib", "Path.write_text"),
        ("pathlib", "PosixPath.unlink"),
        ("collections", "namedtuple"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
    ):
        yield f"{module}.{name}", _stack_global(module, name) + _text("/crafted/lightning_megatron") + b"\x85R"
        if "." not in name:
            yield f"{module}.{name} by GLOBAL", _global(module, name) + _text("/crafted/lightning_megatron") + b"\x85R"


def _attributes() -> Iterator[tuple[str, bytes]]:
    for module, name in (
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch", "float32"),
        ("torch.serialization", "_get_layout"),
        ("torch.nn.parameter", "Parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("argparse", "Namespace"),
        ("megatron.core.enums", "ModelType"),
    ):
        target = _global(module, name)
        yield f"build on {module}.{name}", target + _DICT + b"b"
        yield f"build of slots on {module}.{name}", target + b"N" + _DICT + b"\x86b"
        yield f"setstate on {module}.{name}", target + target + _DICT + b"bb"
    ordered = _global("collections", "OrderedDict") + b")R"
    hidden = b"}" + _text("values") + _global("torch", "Size") + b"s"
    yield "a dictionary that hides its values", ordered + hidden + b"b"
    parameter = b"c__main__\nNothing\n"
    yield "an unknown class", parameter + b")R"


def _malformed() -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "no stop", b"}"
    yield "empty stack", b"."
    yield "pop of nothing", b"0."
    yield "mark of nothing", b"t."
    yield "tuple of nothing", b"\x87."
    yield "memo without entry", b"h\x05."
    yield "memo entry of 4 billion", b"Nr\xff\xff\xff\xff."
    yield "memo entry in text", b"Np4294967290\n."
    yield "protocol 255", b"\x80\xff}."
    yield "unknown opcode", b"\xfe."
    yield "huge frame", b"\x95" + struct.pack("<Q", 2**62) + b"}."
    yield "huge bytes", b"\x8e" + struct.pack("<Q", 2**62) + b"x."
    yield "huge text", b"\x8d" + struct.pack("<Q", 2**62) + b"x."
    yield "huge bytearray", b"\x96" + struct.pack("<Q", 2**62) + b"x."
    yield "huge binary string", b"B" + struct.pack("<I", 2**32 - 1) + b"x."
    yield "huge text of 4 bytes", b"X" + struct.pack("<I", 2**32 - 1) + b"x."
    yield "huge long", b"\x8b" + struct.pack("<I", 2**31 - 1) + b"\x01."
    yield "negative long", b"\x8b" + struct.pack("<i", -5) + b"\x01."
    yield "long in text", b"L" + b"9" * 10_000 + b"L\n."
    yield "bad float", b"Fnothing\n."
    yield "bad text", b"X\x02\x00\x00\x00\xff\xfe."
    yield "unhashable key", b"}]K\x01s."
    yield "buffer", b"\x97."
    yield "read-only buffer", b"\x97\x98."
    yield "list in itself", b"]q\x00h\x00a."
    yield "deep tuples", b")" + b"\x85" * 20_000 + b"."
    yield "deep lists", b"]" * 20_000 + b"a" * 19_999 + b"."
    yield "marks", b"(" * 20_000 + b"."


# ------------------------------------------------------------------------------------------------------------ files


def archive(content: bytes, size: int = 0) -> bytes:
    """A file of ``torch.save`` that holds a pickle, with a comment at its end that makes it ``size`` bytes long."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in (("data.pkl", content), ("byteorder", b"little"), ("version", b"3\n")):
            file.writestr(f"archive/{name}", data)
    if (missing := size - len(buffer.getvalue())) > 0:
        with zipfile.ZipFile(buffer, "a") as file:
            file.comment = bytes(missing)
    return buffer.getvalue()


def old_archive(content: bytes) -> bytes:
    """A file as ``torch.save`` wrote it before there were archives: pickles one after the other."""
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    protocol = b"\x80\x02M\xe9\x03."
    system = b"\x80\x02}(" + _text("protocol_version") + b"M\xe9\x03" + _text("little_endian") + b"\x88u."
    return magic + protocol + system + content + b"\x80\x02]."


def sign(path: Path) -> None:
    """Let the manifest of a checkpoint match its files, as someone with evil intent would."""
    from lightning_megatron.checkpoint import metadata

    data = json.loads((path / FILE).read_text())
    for name in data["files"]:
        content = (path / name).read_bytes()
        data["files"][name] = {"size": len(content), "crc32": zlib.crc32(content)}
    data.pop("crc32")
    data["crc32"] = metadata._crc32(data)
    (path / FILE).write_text(metadata._text(data))
