"""Instruction fine-tuning: prompts without loss, answers with loss, several examples packed into one sequence."""

import bisect
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, override

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_megatron.data.blend import Sample, SplitName
from lightning_megatron.data.cache import cached_maps, digest
from lightning_megatron.data.datamodule import GlobalBatchDataModule
from lightning_megatron.data.indexed import PathLike
from lightning_megatron.data.sampler import BatchRamp
from lightning_megatron.data.tokenizer import Tokenizer, end_of_document_id, prefix_ids, tokenizer_identity
from lightning_megatron.errors import DataError

TooLong = Literal["truncate", "skip", "error"]


@dataclass(frozen=True)
class InstructionSamples:
    """How examples become samples."""

    pack: bool = True
    """Put several examples into one sequence; attention and positions of each stay its own."""

    loss_on_prompt: bool = False
    """Learn the prompt as well as the answer."""

    too_long: TooLong = "truncate"
    """What happens to an example of more than `seq_length` tokens."""


def check_file(path: PathLike) -> None:
    """Raise :class:`DataError` unless there is a file."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist: give a JSON-lines file of examples.")


@dataclass(frozen=True)
class Example:
    """One example as token ids."""

    tokens: list[int]
    learned: list[bool]
    """Whether each token is predicted with loss."""


@dataclass(frozen=True)
class ExampleCounts:
    """What became of the examples of a file."""

    examples: int
    """In the file."""
    truncated: int
    """Whose answer was cut at the end of the sequence."""
    without_answer: int
    """Left out, because the prompt leaves no room for a token of the answer, or the answer is empty."""
    skipped: int
    """Left out, because they are longer than the sequence and `too_long` is ``"skip"``."""


class InstructionDataset(Dataset[Sample]):
    """Examples of a JSON-lines file, packed.

    A line is ``{"prompt": ..., "completion": ...}`` (also `instruction` or `question`, with or without `input`;
    `response`, `output` or `answer`), or ``{"messages": [{"role": ..., "content": ...}, ...]}`` for the tokenizer's
    chat template. A prompt begins with the special tokens that the tokenizer puts before a text, such as Llama's BOS,
    as for `generate`; a chat template adds its own. Answers end with the eos token.

    A sample is a dict of `tokens`, `labels`, `position_ids` (from 0 in each example), `document_ids` (int64) and
    `loss_mask` (float32), each `[seq_length]`. Padding is a document of its own.

    Args:
        path: The file.
        tokenizer: Of Hugging Face.
        seq_length: Tokens of a sample.
        samples: Packing and masking.
        cache_dir: Where the tokenized and packed file is cached; beside it by default.

    Raises:
        DataError: A line that is not such an example, one that is too long if that is an error, or no example at all.
    """

    def __init__(
        self,
        path: PathLike,
        tokenizer: Any,
        seq_length: int,
        samples: InstructionSamples | None = None,
        *,
        cache_dir: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.seq_length = seq_length
        self.samples = samples or InstructionSamples()
        check_file(self.path)
        stat = self.path.stat()
        description = {
            "file": [self.path.name, stat.st_size, stat.st_mtime_ns],
            "tokenizer": tokenizer_identity(tokenizer),
            "seq_length": seq_length,
            "samples": vars(self.samples),
        }
        if prefix := prefix_ids(tokenizer):
            description["prefix"] = prefix
        self.order_id = digest({**description, "file": [stat.st_size]})
        description["counts"] = list(ExampleCounts.__dataclass_fields__)
        directory = cache_dir or self.path.parent / f"{self.path.name}.index_maps"
        maps = cached_maps(directory, description, lambda: self._build(tokenizer))
        self._tokens, self._learned = maps["tokens"], maps["learned"]
        self._starts, self._packed, self._first = maps["starts"], maps["packed"], maps["first"]
        self.counts = ExampleCounts(*map(int, maps["counts"]))
        self._warn()

    def _warn(self) -> None:
        """Say once how many examples are not learned from as they stand."""
        counts, limit = self.counts, f"seq_length={self.seq_length}"
        said = {
            f"left out because their prompts alone fill {limit}, or their answers are empty": counts.without_answer,
            f'left out because they are longer than {limit} (too_long="skip")': counts.skipped,
            f"cut at {limit}, without the end of their answers": counts.truncated,
        }
        if any(said.values()):
            rank_zero_warn(
                f"{self.path}: of {counts.examples:,} examples, "
                + "; ".join(f"{count:,} are {what}" for what, count in said.items() if count)
                + ". Raise seq_length, or shorten them."
            )

    def _build(self, tokenizer: Any) -> dict[str, NDArray[Any]]:
        counter: Counter[str] = Counter()
        examples = list(self._examples(tokenizer, counter))
        counts = ExampleCounts(**{name: counter[name] for name in ExampleCounts.__dataclass_fields__})
        if not examples:
            raise DataError(
                f"{self.path} has no example that can be learned from with seq_length={self.seq_length}: of "
                f"{counts.examples:,}, {counts.without_answer:,} have no room for an answer or an empty one, and "
                f"{counts.skipped:,} are longer. Raise seq_length, or shorten the examples."
            )
        lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
        # An example of n tokens makes n - 1 predictions.
        bins = pack(lengths - 1, self.seq_length) if self.samples.pack else [[index] for index in range(len(examples))]
        return {
            "tokens": np.concatenate([np.array(example.tokens, dtype=np.int32) for example in examples]),
            "learned": np.concatenate([np.array(example.learned, dtype=bool) for example in examples]),
            "starts": np.concatenate(([0], np.cumsum(lengths))),
            "packed": np.array([index for chosen in bins for index in chosen], dtype=np.int64),
            "first": np.concatenate(([0], np.cumsum([len(chosen) for chosen in bins]))),
            "counts": np.array(list(vars(counts).values()), dtype=np.int64),
        }

    def _examples(self, tokenizer: Any, counter: Counter[str]) -> Iterator[Example]:
        limit = self.seq_length + 1
        prefix = prefix_ids(tokenizer)
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                where = f"{self.path}, line {number}"
                example = encode_example(_parse(line, where), tokenizer, where, prefix)
                counter["examples"] += 1
                if len(example.tokens) > limit and self.samples.too_long == "error":
                    raise DataError(
                        f"{self.path}, line {number}: {len(example.tokens)} tokens, seq_length={self.seq_length} "
                        f"takes {limit}. Raise it, or set too_long to 'truncate' or 'skip'."
                    )
                if len(example.tokens) > limit and self.samples.too_long == "skip":
                    counter["skipped"] += 1
                    continue
                learned = [True] * len(example.tokens) if self.samples.loss_on_prompt else example.learned
                # The first token is predicted from nothing; without a learned token an example would only cost time.
                if any(learned[1:limit]):
                    counter["truncated"] += len(example.tokens) > limit
                    yield Example(example.tokens[:limit], learned[:limit])
                else:
                    counter["without_answer"] += 1

    def __len__(self) -> int:
        return len(self._first) - 1

    def examples(self, index: int) -> list[int]:
        """Numbers of the examples in a sample."""
        return [int(example) for example in self._packed[self._first[index] : self._first[index + 1]]]

    def __getitem__(self, index: int) -> Sample:
        tokens, labels = np.zeros(self.seq_length, dtype=np.int64), np.zeros(self.seq_length, dtype=np.int64)
        loss_mask = np.zeros(self.seq_length, dtype=np.float32)
        positions, documents = np.zeros(self.seq_length, dtype=np.int64), np.zeros(self.seq_length, dtype=np.int64)
        begin = 0
        chosen = self.examples(index)
        for number, example in enumerate(chosen):
            start, stop = self._starts[example], self._starts[example + 1]
            end = begin + int(stop - start) - 1
            tokens[begin:end] = self._tokens[start : stop - 1]
            labels[begin:end] = self._tokens[start + 1 : stop]
            loss_mask[begin:end] = self._learned[start + 1 : stop]
            positions[begin:end] = np.arange(end - begin)
            documents[begin:end] = number
            begin = end
        documents[begin:] = len(chosen)
        positions[begin:] = np.arange(self.seq_length - begin)
        arrays = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}
        arrays |= {"position_ids": positions, "document_ids": documents}
        return {key: torch.from_numpy(array) for key, array in arrays.items()}


def pack(lengths: Sequence[int] | NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Put items into bins: the longest first, each into the fullest bin that has room (best fit decreasing).

    Returns:
        The items of each bin. No bin exceeds `capacity`, and every item is in one bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda index: (-int(lengths[index]), index)):
        length = int(lengths[item])
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            free, chosen = room.pop(place)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if free > length:
            bisect.insort(room, (free - length, chosen))
    return bins


def encode_example(example: dict[str, Any], tokenizer: Any, where: str, prefix: Sequence[int] | None = None) -> Example:
    """Token ids of one example; see :class:`InstructionDataset` for its forms.

    Args:
        prefix: What begins a prompt; by default, :func:`prefix_ids` of the tokenizer.

    Raises:
        DataError: The example has no such form.
    """
    eos = end_of_document_id(tokenizer)
    ending = [] if eos is None else [eos]
    if "messages" in example:
        return _encode_messages(example["messages"], tokenizer, where)
    prompts = [example[key] for key in ("prompt", "instruction", "question", "input", "context") if example.get(key)]
    answers = [example[key] for key in ("completion", "response", "output", "answer") if key in example]
    if not prompts or len(answers) != 1 or not all(isinstance(text, str) for text in (*prompts, *answers)):
        raise DataError(
            f"{where}: an example needs a prompt (prompt, instruction or question) and one answer (completion, "
            f"response, output or answer) as texts, or messages; it has {', '.join(example) or 'nothing'}."
        )
    begin = prefix_ids(tokenizer) if prefix is None else list(prefix)
    prompt = begin + tokenizer("\n".join(prompts), add_special_tokens=False)["input_ids"]
    answer = tokenizer(answers[0], add_special_tokens=False)["input_ids"] + ending
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def _encode_messages(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Example:
    """What the template adds for each answer is learned, all else is not."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"{where}: messages need a tokenizer with a chat template; this one has none.")

    def rendered(count: int, *, prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    whole = rendered(len(messages), prompt=False)
    learned = [False] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            begin, end = len(rendered(index, prompt=True)), len(rendered(index + 1, prompt=False))
            learned[begin:end] = [True] * (min(end, len(whole)) - begin)
    return Example(whole, learned)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        example = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}, is not JSON ({error}): {line[:80]!r}") from error
    if not isinstance(example, dict):
        raise DataError(f"{where}, is no JSON object: {line[:80]!r}")
    return example


class FineTuningData(GlobalBatchDataModule):
    """Instruction fine-tuning data from JSON-lines files, one for each split.

    Args:
        train_path, valid_path, test_path: Files; see :class:`InstructionDataset`.
        tokenizer: Directory, JSON file or object.
        seq_length: Tokens of a sample.
        samples: Packing and masking.
        cache_dir: Where tokenized files are cached; beside them by default.
        global_batch_size, num_workers, seed, rampup_batch_size: See :class:`GlobalBatchDataModule`.
    """

    def __init__(
        self,
        train_path: PathLike | None = None,
        *,
        tokenizer: PathLike | Tokenizer,
        seq_length: int,
        valid_path: PathLike | None = None,
        test_path: PathLike | None = None,
        samples: InstructionSamples | None = None,
        cache_dir: PathLike | None = None,
        global_batch_size: int,
        num_workers: int = 2,
        seed: int = 1234,
        rampup_batch_size: tuple[int, int, int] | BatchRamp | None = None,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            seed=seed,
            rampup_batch_size=rampup_batch_size,
            tokenizer=tokenizer,
        )
        self.paths: dict[SplitName, PathLike | None] = {"train": train_path, "valid": valid_path, "test": test_path}
        self.seq_length = seq_length
        self.samples = samples
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self.example_counts: dict[SplitName, ExampleCounts] = {}
        """What became of the examples of each split, after `setup`."""

    @override
    def check_files(self, stage: str) -> None:
        for name in self.splits_of(stage):
            path = self.paths[name]
            if path is not None:
                check_file(path)

    def setup(self, stage: str) -> None:
        """Tokenize and pack the files that `stage` needs, or load what is cached."""
        for name in self.splits_of(stage):
            path = self.paths[name]
            if path is not None:
                dataset = InstructionDataset(
                    path, self.tokenizer, self.seq_length, self.samples, cache_dir=self.cache_dir
                )
                self.datasets[name], self.example_counts[name] = dataset, dataset.counts
            elif name == "train":
                raise DataError("Fitting needs train_path: FineTuningData(train_path=...).")
