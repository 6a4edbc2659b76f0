"""`lightning-megatron preprocess`: text to indexed datasets, merging them, and a look at them."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from lightning_megatron.cli.trust import add_trust
from lightning_megatron.errors import DataError
from lightning_megatron.printable import printable


def add_parser(subparsers: Any) -> None:
    """Add the command to a parser's subparsers; it sets `run` to :func:`run`."""
    parser = subparsers.add_parser(
        "preprocess",
        help="tokenize text into indexed datasets; merge and inspect them",
        description="A run that was interrupted goes on where it was when the same command is given again.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        help=".jsonl or .txt (also .gz, .zst), .parquet, datasets on disk; prefixes of datasets to merge or inspect",
    )
    parser.add_argument("--output", help="prefix; key K goes to PREFIX_K_document.bin and .idx")
    parser.add_argument("--tokenizer", help="directory or name for AutoTokenizer, or a tokenizer.json")
    add_trust(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--merge", action="store_true", help="concatenate indexed datasets into OUTPUT instead")
    instead.add_argument("--inspect", action="store_true", help="count, decode and draw indexed datasets instead")
    parser.add_argument("--histogram", type=Path, help="of --inspect: PNG of the document lengths (default PREFIX.png)")
    parser.add_argument("--keys", "--json-keys", nargs="+", default=["text"], help="a dataset is made of each")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the eos token")
    parser.add_argument(
        "--add-special-tokens", action="store_true", help="such as bos, as the tokenizer does for a text"
    )
    parser.add_argument("--split-sentences", action="store_true", help="make each sentence a sequence, for BERT")
    parser.add_argument("--sentence-splitter", choices=["auto", "nltk", "simple"], default="auto")
    parser.add_argument("--language", default="english", help="of nltk's splitter")
    parser.add_argument("--text-separator", help="between the documents of a text file, such as '\\n\\n'")
    parser.add_argument(
        "--max-document-bytes", type=int, metavar="N", default=256 << 20, help="a longer document is an error (256 MiB)"
    )
    parser.add_argument("--empty-documents", choices=["error", "skip", "keep"], default="error")
    parser.add_argument("--engine", choices=["tokenizers", "gigatoken"], default="tokenizers")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed; the exit code is 1 after an error, which is printed in one line."""
    from rich.console import Console

    command = _merge if args.merge else _inspect if args.inspect else _preprocess
    try:
        command(args, Console())
    except (DataError, OSError) as error:  # such as an output that cannot be written
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_plain(str(error))}")
        return 1
    return 0


def _require(args: argparse.Namespace, *names: str) -> None:
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if missing:
        raise DataError(f"Give {' and '.join(missing)} as well.")


def _plain(text: str) -> str:
    """Text in which rich reads no markup and a terminal no commands."""
    from rich.markup import escape

    return escape(printable(text))


def _preprocess(args: argparse.Namespace, console: Any) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from lightning_megatron.data.preprocessing import PreprocessOptions, preprocess
    from lightning_megatron.data.preprocessing import Progress as Reached
    from lightning_megatron.data.preprocessing.sources import input_bytes
    from lightning_megatron.data.tokenizer import load_tokenizer

    _require(args, "output", "tokenizer")
    input_bytes(args.inputs)  # a missing input is told before a tokenizer is loaded
    tokenizer = load_tokenizer(args.tokenizer, from_hub=args.from_hub, trust_remote_code=args.trust_remote_code)
    options = PreprocessOptions(
        keys=tuple(args.keys),
        append_eod=args.append_eod,
        add_special_tokens=args.add_special_tokens,
        split_sentences=args.split_sentences,
        sentence_splitter=args.sentence_splitter,
        language=args.language,
        text_separator=args.text_separator.encode().decode("unicode_escape") if args.text_separator else None,
        empty_documents=args.empty_documents,
        engine=args.engine,
        max_document_bytes=args.max_document_bytes,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    progress = Progress(*columns, console=console)
    task = progress.add_task("tokenizing", total=None, documents=0, tokens=0)

    def show(reached: Reached) -> None:
        progress.start()  # at the first text, since what is wrong with the arguments needs no bar
        progress.update(
            task,
            total=reached.total_bytes,
            completed=reached.input_bytes,
            documents=reached.documents,
            tokens=reached.tokens,
        )

    try:
        prefixes = preprocess(args.inputs, args.output, tokenizer, options, workers=args.workers, on_progress=show)
    finally:
        if progress.live.is_started:
            progress.stop()
    console.print(f"{time.perf_counter() - started:.1f} s with {args.workers} workers. Datasets:")
    for prefix in prefixes:
        console.print(f"  {_plain(str(prefix))}", soft_wrap=True)


def _merge(args: argparse.Namespace, console: Any) -> None:
    from lightning_megatron.data.indexed import IndexedDataset, merge

    _require(args, "output")
    merge(args.inputs, args.output)
    merged = IndexedDataset(args.output)
    console.print(f"{_plain(args.output)}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens")


def _inspect(args: argparse.Namespace, console: Any) -> None:
    import numpy as np
    from rich.table import Table

    from lightning_megatron.data.inspection import inspect, save_histogram
    from lightning_megatron.data.tokenizer import load_tokenizer

    trust = {"from_hub": args.from_hub, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(args.tokenizer, **trust) if args.tokenizer else None
    for prefix in args.inputs:
        found = inspect(prefix, tokenizer)
        lengths = found.document_lengths
        table = Table(title=_plain(str(prefix)), show_header=False, title_justify="left")
        rows = {
            "documents": f"{found.documents:,} ({found.empty_documents:,} empty)",
            "sequences": f"{found.sequences:,}",
            "tokens": f"{found.tokens:,} as {found.dtype}, largest id {found.largest_id:,}",
            "document length": f"mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, longest {lengths.max():,}"
            if len(lengths)
            else "-",
            "checksums": "all agree" if found.has_checksums else "none recorded: the tokens were not verified",
            "sample": _plain(found.sample),
        }
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
        histogram = args.histogram or Path(f"{prefix}.png")
        save_histogram(found, histogram)
        console.print(f"Document lengths are drawn in {_plain(str(histogram))}.", soft_wrap=True)
