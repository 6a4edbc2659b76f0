"""A process that tries damaged directories one by one, with a limit of memory and of time for each.

``python -m tests.interop.damage_trial DIRECTORY FIRST`` prints a JSON line for each case from number ``FIRST`` on.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from lightning_megatron.errors import CheckpointError, DataError
from tests.interop.damaged import Case, cases

SECONDS = 20
MEMORY = 3 * 2**30
"""Above what the process has before the first case."""
REMEDIES = (
    *("fetch", "correct", "give ", "take ", "load another", "load it", "remove", "copy", "keep ", "upgrade"),
    *("where only", "must be", "is none of", "nearest", "at most", "are supported", "is supported", "only ", "leave "),
)
"""One of these says what to do, or what the value may be."""


def sources(directory: Path) -> None:
    """Write the directories that are damaged."""
    from lightning_megatron.interop.convert import Conversion, convert
    from tests.interop import tiny

    for name in ("gpt2", "bert", "t5"):
        tiny.save(name, directory / name, max_shard_size="1GB")
    tiny.save("llama", directory / "llama")
    convert(Conversion(load_path=directory / "gpt2", save_path=directory / "ours", to="lightning"))
    tiny.tokenizer(directory / "tokenizer", eos_token="w1")


def attempt(case: Case, directory: Path) -> tuple[str, str]:
    """The verdict on one case, and what was said."""
    from lightning_megatron.data.tokenizer import load_tokenizer
    from lightning_megatron.interop.convert import Conversion, convert

    path, target = directory / "case", directory / "target"
    for old in (path, target):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(directory / case.source, path)
    case.damage(path)
    model = path if case.source != "tokenizer" else directory / "gpt2"
    to: Any = "lightning" if case.source != "tokenizer" else "huggingface"
    try:
        tokenizer = load_tokenizer(path) if case.source == "tokenizer" else None
        convert(Conversion(load_path=model, save_path=target, to=to, tokenizer=tokenizer))
    except (CheckpointError, DataError) as error:
        said = " ".join(str(error).split())
        named = any(text in said for text in case.says) and any(word in said.lower() for word in REMEDIES)
        return "named" if named else "unclear", f"{type(error).__name__}: {said}"
    except (MemoryError, TimeoutError) as error:
        return "out of memory" if isinstance(error, MemoryError) else "hang", repr(error)
    except BaseException as error:
        out_of_memory = any(text in str(error) for text in ("not enough memory", "annot allocate", "can't allocate"))
        return "out of memory" if out_of_memory else "unclear", f"{type(error).__name__}: {error}"
    return "silent", ""


def main(directory: Path, first: int) -> None:
    """Try the cases from a number on."""
    import transformers

    transformers.logging.set_verbosity_error()
    for source in ("gpt2", "ours", "tokenizer"):  # imports what there is before memory and time are limited
        whole = attempt(Case("whole", source, lambda path: None, ()), directory)
        assert whole[0] == "silent", whole

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number, case in enumerate(cases()[first:], first):
        print(json.dumps([number, case.name, "died", ""]), flush=True)
        signal.alarm(SECONDS)
        try:
            verdict, said = attempt(case, directory)
        finally:
            signal.alarm(0)
        print(json.dumps([number, case.name, verdict, said[:3000]]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
