"""Text files to indexed datasets: many workers, one ordered output, restart after a kill."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, TextIO

import numpy as np

from lightning_megatron.data.files import explaining_write_errors
from lightning_megatron.data.index_format import regular_file
from lightning_megatron.data.indexed import PathLike, token_dtype
from lightning_megatron.data.preprocessing.encoding import (
    BlockEncoder,
    EmptyDocuments,
    EncodedBlock,
    Engine,
    Gigatoken,
    bulk_encoder,
    cuts_at_white_space,
)
from lightning_megatron.data.preprocessing.resumable import Position, ResumableWriter, load_progress, save_progress
from lightning_megatron.data.preprocessing.sentences import Splitter, sentence_splitter
from lightning_megatron.data.preprocessing.sources import MAX_DOCUMENT_BYTES, Block, blocks, documents, input_bytes
from lightning_megatron.data.tokenizer import Tokenizer, end_of_document_id, load_tokenizer, tokenizer_identity
from lightning_megatron.errors import DataError

_COMMIT_SECONDS = 5.0
_BLOCKS_AHEAD = 3  # of each worker


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    input_bytes: int
    total_bytes: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class PreprocessOptions:
    """What is done with the text."""

    keys: tuple[str, ...] = ("text",)
    """Keys of JSON, or columns; each makes a dataset of its own."""

    append_eod: bool = False
    """End each document with the eos token (of BERT-like tokenizers: the separator)."""

    add_special_tokens: bool = False
    """Add what the tokenizer adds to a single text, such as a bos token before it."""

    split_sentences: bool = False
    """Make each sentence a sequence, for BERT."""

    sentence_splitter: Splitter = "auto"
    """nltk's punkt or a simple splitter; "auto" is punkt where it is installed with its data."""

    language: str = "english"
    """Language of punkt."""

    text_separator: str | None = None
    """Between the documents of a text file; None takes each text file for one document."""

    empty_documents: EmptyDocuments = "error"
    """Documents without a token: an error, left out, or kept as documents without a sequence, as Megatron does."""

    engine: Engine = "tokenizers"
    """"tokenizers", or "gigatoken" if it is installed: the same ids, many times faster."""

    block_bytes: int = 4 << 20
    """Text that a worker tokenizes at a time."""

    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Limit of one document. A text file that is one document may be longer, where the tokenizer's words end at white
    space so that it can be read in pieces."""


def preprocess(
    inputs: Sequence[PathLike],
    output: PathLike,
    tokenizer: PathLike | Tokenizer,
    options: PreprocessOptions | None = None,
    *,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Path]:
    """Tokenize text into indexed datasets named as Megatron names them.

    The output does not depend on the number of workers. A run that was killed goes on where it was when it is started
    again in the same way; until it has finished there is no dataset at `output`.

    Args:
        inputs: JSON lines or text, plain, `.gz` or `.zst`; Parquet; directories of `datasets.save_to_disk`.
        output: Prefix; key `k` goes to ``{output}_{k}_document.bin`` and `.idx` (``_sentence`` if sentences are split).
        tokenizer: Directory, JSON file, or object.
        options: What is done with the text.
        workers: Processes, all cores by default; 0 does the work in this process.
        on_progress: Called after each block.

    Returns:
        The prefix of each key's dataset.

    Raises:
        DataError: An input that is missing or damaged, a document that cannot be used, a full disk, a worker that died.
    """
    options = options or PreprocessOptions()
    workers = (os.cpu_count() or 1) if workers is None else workers
    total = input_bytes(inputs)
    loaded = load_tokenizer(tokenizer)
    encoder = _block_encoder(loaded, options, inputs)
    level = "sentence" if options.split_sentences else "document"
    prefixes = [Path(f"{os.fspath(output)}_{key}_{level}") for key in options.keys]
    state = Path(f"{os.fspath(output)}.progress.json")
    with _alone(Path(f"{os.fspath(output)}.lock"), output):
        job = _describe(inputs, loaded, options)
        done, positions = load_progress(state, job, len(prefixes))
        if not all(map(ResumableWriter.can_continue, prefixes, repeat(encoder.dtype), positions)):
            done, positions = 0, [Position()] * len(prefixes)
        writers = [
            ResumableWriter(prefix, encoder.dtype.type, position)
            for prefix, position in zip(prefixes, positions, strict=True)
        ]

        def report(read: int) -> None:
            if on_progress is not None:
                on_progress(Progress(read, total, writers[0].num_documents, writers[0].num_tokens))

        cut = not options.split_sentences and not options.add_special_tokens and cuts_at_white_space(loaded)
        source = blocks(
            inputs,
            options.block_bytes,
            options.text_separator,
            max_document_bytes=options.max_document_bytes,
            cut_texts=cut,
        )
        run = _Run(encoder, source, workers, done)
        try:
            _write(run, writers, lambda blocks, positions: save_progress(state, job, blocks, positions), report)
        finally:
            for writer in writers:
                writer.release()
        with explaining_write_errors(state):
            state.unlink(missing_ok=True)
    return prefixes


def _write(
    run: "_Run",
    writers: Sequence[ResumableWriter],
    save: Callable[[int, Sequence[Position]], None],
    report: Callable[[int], None],
) -> None:
    """Write all blocks, now and then recording how many are safe, also when an error ends the run."""
    blocks, positions = run.done, [writer.position for writer in writers]
    read, saved = run.skipped_bytes, time.monotonic()
    try:
        for block, encoded in run.results():
            for writer, part in zip(writers, encoded, strict=True):
                if part.unfinished:
                    writer.add_part(part.tokens)
                else:
                    writer.add_documents(part.tokens, part.lengths, part.sequences)
            blocks, positions = blocks + 1, [writer.position for writer in writers]
            read += block.input_bytes
            if time.monotonic() - saved > _COMMIT_SECONDS:
                for writer in writers:
                    writer.flush()
                save(blocks, positions)
                saved = time.monotonic()
            report(read)
    except BaseException:
        with suppress(DataError, OSError):  # on a full disk what was recorded before holds
            for writer in writers:
                if blocks:
                    writer.flush()
                else:
                    writer.discard()
            if blocks:
                save(blocks, positions)
        raise
    for writer in writers:
        writer.close()


def _block_encoder(tokenizer: Any, options: PreprocessOptions, inputs: Sequence[PathLike]) -> BlockEncoder:
    encode = bulk_encoder(tokenizer, add_special_tokens=options.add_special_tokens)
    encode_lines = None
    if options.engine == "gigatoken":
        fast = Gigatoken(tokenizer)
        fast.check(encode, _first_texts(inputs, options))
        encode, encode_lines = fast.encode, fast.encode_lines
    end_of_document = end_of_document_id(tokenizer) if options.append_eod else None
    if options.append_eod and end_of_document is None:
        raise DataError(
            "append_eod needs a tokenizer with an eos token (or, for BERT, a separator): this one has neither."
        )
    return BlockEncoder(
        keys=options.keys,
        encode=encode,
        dtype=np.dtype(token_dtype(len(tokenizer))),
        end_of_document=end_of_document,
        split=sentence_splitter(options.sentence_splitter, options.language) if options.split_sentences else None,
        empty_documents=options.empty_documents,
        encode_lines=encode_lines,
    )


def _first_texts(inputs: Sequence[PathLike], options: PreprocessOptions) -> list[str]:
    limit = options.max_document_bytes
    first = next(blocks(inputs, 1 << 16, options.text_separator, max_document_bytes=limit, cut_texts=True), None)
    if first is None:
        return []
    texts = documents(first, options.keys)[0][:20]
    return [text[:10_000] if isinstance(text, str) else " ".join(text)[:10_000] for text in texts]


def _describe(inputs: Sequence[PathLike], tokenizer: Any, options: PreprocessOptions) -> str:
    """Names a job, so that only the same one is continued. Limits and engine may change on the way."""
    files = [(str(Path(path).resolve()), Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in inputs]
    changeable = ("empty_documents", "engine", "max_document_bytes")
    fields = {name: value for name, value in vars(options).items() if name not in changeable}
    text = json.dumps([files, tokenizer_identity(tokenizer), fields], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _alone(path: Path, output: PathLike) -> Iterator[None]:
    with explaining_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        regular_file(path)  # opening a pipe would block
        file = path.open("a")
    with file:
        if not _lock(file, path):
            raise DataError(f"Another process is writing {os.fspath(output)}: wait for it, or choose another output.")
        yield
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _lock(file: TextIO, path: Path) -> bool:
    """Whether no other process holds the lock; file systems without locks let everybody in."""
    try:
        # A record lock: unlike that of flock, workers do not inherit it, and it ends with this process.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The file that was locked may be one that its owner has just removed.
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.EAGAIN, errno.EACCES)


class _Worker:
    """Holds what a worker process needs: a fork inherits it, so that no tokenizer is pickled or loaded twice."""

    encoder: ClassVar[BlockEncoder | None] = None

    @staticmethod
    def start(encoder: BlockEncoder, parent: int) -> None:
        # One process is one core: threads of the tokenizer would only be in each other's way.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _Worker.encoder = encoder
        threading.Thread(target=_Worker._end_with, args=(parent,), daemon=True).start()

    @staticmethod
    def _end_with(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    @staticmethod
    def encode(block: Block) -> list[EncodedBlock]:
        if _Worker.encoder is None:
            raise DataError("The worker was not started.")
        return _Worker.encoder(block)


class _Run:
    """The blocks from number `done` on and what they become, in order."""

    def __init__(self, encoder: BlockEncoder, source: Iterator[Block], workers: int, done: int) -> None:
        self._encoder = encoder
        self._source = source
        self._workers = workers
        self.done = done
        self.skipped_bytes = sum(next(source).input_bytes for _ in range(done))

    def results(self) -> Iterator[tuple[Block, list[EncodedBlock]]]:
        if self._workers == 0:
            for block in self._source:
                yield block, self._encoder(block)
            return
        pool = ProcessPoolExecutor(
            self._workers, multiprocessing.get_context("fork"), _Worker.start, (self._encoder, os.getpid())
        )
        pending: deque[tuple[Block, Future[list[EncodedBlock]]]] = deque()
        try:
            for block in self._source:
                pending.append((block, pool.submit(_Worker.encode, block)))
                if len(pending) > _BLOCKS_AHEAD * self._workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"A worker died while {self._workers} were tokenizing, most likely for want of memory. Use fewer "
                "workers; starting again continues where this run stopped."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
