"""`lightning-megatron preprocess`, `merge` and `inspect`: text to indexed datasets, and a look at them."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from lightning_megatron.errors import DataError


def add_parser(subparsers: Any) -> None:
    """Add the three commands to a parser's subparsers; each sets `run` to :func:`run`."""
    _add_preprocess(subparsers)
    merge = subparsers.add_parser("merge", help="concatenate indexed datasets")
    merge.add_argument("inputs", nargs="+", help="dataset prefixes, in order")
    merge.add_argument("--output", required=True, help="prefix of the result")
    inspect = subparsers.add_parser("inspect", help="count, decode and draw what indexed datasets hold")
    inspect.add_argument("inputs", nargs="+", help="dataset prefixes")
    inspect.add_argument("--tokenizer", help="decodes the sample")
    inspect.add_argument("--histogram", type=Path, help="draw the document lengths into this PNG (default PREFIX.png)")
    for command, parser in (("merge", merge), ("inspect", inspect)):
        parser.set_defaults(run=run, data_command=command)


def _add_preprocess(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "preprocess",
        help="tokenize text into indexed datasets",
        description="A run that was interrupted goes on where it was when the same command is given again.",
    )
    parser.add_argument("inputs", nargs="+", help=".jsonl or .txt (also .gz, .zst), .parquet, datasets on disk")
    parser.add_argument("--output", required=True, help="prefix; key K goes to PREFIX_K_document.bin and .idx")
    parser.add_argument("--tokenizer", required=True, help="directory or name for AutoTokenizer, or a tokenizer.json")
    parser.add_argument("--keys", "--json-keys", nargs="+", default=["text"], help="a dataset is made of each")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the eos token")
    parser.add_argument("--split-sentences", action="store_true", help="make each sentence a sequence, for BERT")
    parser.add_argument("--sentence-splitter", choices=["auto", "nltk", "simple"], default="auto")
    parser.add_argument("--language", default="english", help="of nltk's splitter")
    parser.add_argument("--text-separator", help="between the documents of a text file, such as '\\n\\n'")
    parser.add_argument("--empty-documents", choices=["error", "skip", "keep"], default="error")
    parser.add_argument("--engine", choices=["tokenizers", "gigatoken"], default="tokenizers")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.set_defaults(run=run, data_command="preprocess")


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed; the exit code is 1 after an error, which is printed in one line."""
    from rich.console import Console

    commands = {"preprocess": _preprocess, "merge": _merge, "inspect": _inspect}
    try:
        commands[args.data_command](args, Console())
    except DataError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_plain(str(error))}")
        return 1
    return 0


def _plain(text: str) -> str:
    """Text in which rich reads no markup."""
    from rich.markup import escape

    return escape(text)


def _preprocess(args: argparse.Namespace, console: Any) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from lightning_megatron.data.preprocessing import PreprocessOptions, preprocess
    from lightning_megatron.data.preprocessing import Progress as Reached

    options = PreprocessOptions(
        keys=tuple(args.keys),
        append_eod=args.append_eod,
        split_sentences=args.split_sentences,
        sentence_splitter=args.sentence_splitter,
        language=args.language,
        text_separator=args.text_separator.encode().decode("unicode_escape") if args.text_separator else None,
        empty_documents=args.empty_documents,
        engine=args.engine,
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
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tokenizing", total=None, documents=0, tokens=0)

        def show(reached: Reached) -> None:
            progress.update(
                task,
                total=reached.total_bytes,
                completed=reached.input_bytes,
                documents=reached.documents,
                tokens=reached.tokens,
            )

        prefixes = preprocess(args.inputs, args.output, args.tokenizer, options, workers=args.workers, on_progress=show)
    console.print(f"{time.perf_counter() - started:.1f} s with {args.workers} workers. Datasets:")
    for prefix in prefixes:
        console.print(f"  {_plain(str(prefix))}", soft_wrap=True)


def _merge(args: argparse.Namespace, console: Any) -> None:
    from lightning_megatron.data.indexed import IndexedDataset, merge

    merge(args.inputs, args.output)
    merged = IndexedDataset(args.output)
    console.print(f"{_plain(args.output)}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens")


def _inspect(args: argparse.Namespace, console: Any) -> None:
    import numpy as np
    from rich.table import Table

    from lightning_megatron.data.inspection import inspect, save_histogram
    from lightning_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
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
            "sample": _plain(found.sample),
        }
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
        histogram = args.histogram or Path(f"{prefix}.png")
        save_histogram(found, histogram)
        console.print(f"Document lengths are drawn in {_plain(str(histogram))}.", soft_wrap=True)
