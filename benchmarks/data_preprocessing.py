"""Throughput of `lightning-megatron preprocess` against Megatron-LM's own tools, as a ratio in one run.

    python benchmarks/data_preprocessing.py --megatron-lm PATH [--megabytes 24] [--fast-megabytes 400] [--workers 2]

The corpus is the documentation that Python ships, recombined so that no document repeats; the tokenizer a byte-level
BPE of 4096 ids. Each command is timed whole, start-up included, several times in turn; the best counts. On a machine
with other work the ratio of processor time tells more than that of wall time. The outputs
have to be equal byte for byte. The fast comparison needs `pip install gigatoken`.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lightning_megatron.data.corpus import python_documentation
from lightning_megatron.data.tokenizer import END_OF_TEXT, train_byte_level_bpe

OURS = """
import sys
from lightning_megatron.data.preprocessing import PreprocessOptions, preprocess
preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], PreprocessOptions(append_eod=True, engine=sys.argv[5]),
           workers=int(sys.argv[4]))
"""


def write_corpus(documents: list[str], path: Path, size: int) -> None:
    """Write about `size` bytes of JSON lines."""
    chosen = random.Random(0)
    written = 0
    with path.open("w") as file:
        while written < size:
            text = "\n\n".join(part[: chosen.randint(200, 4000)] for part in chosen.sample(documents, 2))
            written += file.write(json.dumps({"text": text}) + "\n")


def seconds(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, float]:
    """Wall and processor time of a command that has to succeed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as output:
        result = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{log.read_text()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, processor


def compare(commands: dict[str, list[str]], checkout: Path, corpus: Path, work: Path, repeats: int) -> None:
    """Print the rates of both commands, and how many times faster ours is."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    # The tools have to import their own checkout and not an installed megatron-core.
    theirs_environment = environment | {"PYTHONPATH": str(checkout.resolve())}
    times: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
    for _ in range(repeats):
        times["theirs"].append(seconds(commands["theirs"], theirs_environment, work / "theirs.log"))
        times["ours"].append(seconds(commands["ours"], environment, work / "ours.log"))
    for suffix in ("bin", "idx"):
        pair = [(work / f"{name}_text_document.{suffix}").read_bytes() for name in times]
        if pair[0] != pair[1]:
            raise SystemExit(f"The .{suffix} files differ.")
    megabytes = corpus.stat().st_size / 1e6
    best = {name: (min(w for w, _ in measured), min(p for _, p in measured)) for name, measured in times.items()}
    for name, measured in times.items():
        wall, processor = best[name]
        each = ", ".join(f"{w:.1f} s (processor {p:.1f} s)" for w, p in measured)
        print(f"  {name:7}{megabytes / wall:8.2f} MB/s {megabytes / processor:8.2f} MB per processor second   {each}")
    ratios = [theirs / ours for theirs, ours in zip(best["theirs"], best["ours"], strict=True)]
    print(f"  ratio  {ratios[0]:8.2f}      {ratios[1]:8.2f}   same bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron-lm", type=Path, required=True, help="a checkout of Megatron-LM")
    parser.add_argument("--megabytes", type=int, default=24)
    parser.add_argument("--fast-megabytes", type=int, default=400)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    documents = list(python_documentation())
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        tokenizer = train_byte_level_bpe(documents, 4096, work / "tokenizer")
        for tool, engine, size in (
            ("preprocess_data.py", "tokenizers", args.megabytes),
            ("preprocess_data_fast.py", "gigatoken", args.fast_megabytes),
        ):
            if not size:
                continue
            corpus = work / "corpus.jsonl"
            write_corpus(documents, corpus, size * 1_000_000)
            theirs = [sys.executable, str(args.megatron_lm / "tools" / tool), "--input", str(corpus), "--append-eod"]
            theirs += ["--output-prefix", str(work / "theirs"), "--tokenizer-type", "HuggingFaceTokenizer"]
            theirs += ["--tokenizer-model", str(tokenizer)]
            theirs += ["--use-gigatoken"] if engine == "gigatoken" else ["--workers", str(args.workers)]
            ours = [sys.executable, "-c", OURS, str(corpus), str(work / "ours"), str(tokenizer)]
            ours += [str(args.workers), engine]
            print(f"{tool}, {size} MB, {args.workers} workers, {END_OF_TEXT} appended:")
            compare({"theirs": theirs, "ours": ours}, args.megatron_lm, corpus, work, args.repeats)


if __name__ == "__main__":
    main()
