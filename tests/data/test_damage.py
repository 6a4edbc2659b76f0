"""No damage of a dataset or of what stands beside it passes in silence, and every error says what to do."""

import re
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from lightning_megatron.data.cache import cached_maps, digest
from lightning_megatron.data.indexed import IndexedDataset, IndexedDatasetWriter, idx_path, merge
from lightning_megatron.data.preprocessing.resumable import Position, load_progress, save_progress
from lightning_megatron.errors import DataError
from tests.data import damage

SUFFIXES = ("bin", "idx", "manifest.json", "checked.json")
REMEDY = re.compile(r"[Cc]opy|[Rr]emove|[Pp]reprocess|[Cc]orrect|[Gg]ive ")
SECONDS = 10


def write(prefix: Path, documents: int, seed: int, lengths_seed: int = 0) -> Path:
    lengths, tokens = np.random.default_rng(lengths_seed), np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            sentences = lengths.integers(1, 30, lengths.integers(1, 4))
            writer.add_document(tokens.integers(0, 60000, sentences.sum()), sentences.tolist())
    return prefix


def read(prefix: Path) -> list[list[list[int]]]:
    """All documents, as lists of sequences."""
    dataset = IndexedDataset(prefix)
    dataset.require_token_ids()
    return [
        [dataset[sequence].tolist() for sequence in range(*dataset.document_indices[number : number + 2])]
        for number in range(dataset.num_documents)
    ]


def stop(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError


def outcome(action: Callable[[], Any], truth: Any, name: str) -> str:
    """`harmless`, `silent`, `named`, or `unclear: ...` with what was raised."""
    signal.alarm(SECONDS)
    try:
        return "harmless" if action() == truth else "silent"
    except DataError as error:
        message = str(error)
        return "named" if name in message and REMEDY.search(message) else f"unclear: {message}"
    except (Exception, TimeoutError) as error:
        return f"unclear: {error!r}"
    finally:
        signal.alarm(0)


@pytest.fixture(autouse=True)
def no_hang() -> Iterable[None]:
    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("corpora")
    return {
        "true": write(directory / "corpus", 40, 1),
        "a corpus of the same lengths": write(directory / "alike", 40, 2),
        "another corpus": write(directory / "other", 37, 3, 9),
    }


def dataset_outcomes(corpora: dict[str, Path], directory: Path, mode: str, step: int) -> dict[str, str]:
    """Outcome of every case: of a dataset of ours, of one of another tool that was opened before, and of a bare one."""
    others = {name: path for name, path in corpora.items() if name != "true"}
    cases = [*damage.index_cases(others), *damage.bin_cases(others)]
    if mode != "bare":
        cases += damage.side_file_cases("manifest.json" if mode == "ours" else "checked.json")
    truth = read(corpora["true"])
    pristine = directory / "pristine" / "corpus"
    pristine.parent.mkdir()
    for suffix in SUFFIXES[: 3 if mode == "ours" else 2]:
        shutil.copyfile(f"{corpora['true']}.{suffix}", f"{pristine}.{suffix}")
    outcomes = {}
    for number, (name, change) in enumerate(islice(cases, 0, None, step)):
        prefix = directory / str(number) / "corpus"
        shutil.copytree(pristine.parent, prefix.parent)
        if mode == "recorded":
            read(prefix)
        change(prefix)
        outcomes[name] = outcome(partial(read, prefix), truth, "corpus")
        shutil.rmtree(prefix.parent)
    return outcomes


def count(outcomes: dict[str, str]) -> Counter[str]:
    return Counter(result.split(":")[0] for result in outcomes.values())


# Files of other tools hold no checksum of the tokens, and their index none of itself. Code 3 is int16 in place of
# uint16: ids that become negative are refused when a sample is made.
UNSEEN_WITHOUT_MANIFEST = re.compile(r"bin: (bit|halves|reversed|zeros|of a corpus of the same lengths)")
UNSEEN_AT_FIRST_SIGHT = re.compile(
    r"idx: (consistent swap|boundary -?\d+ |random bit|dtype code 3)|" + UNSEEN_WITHOUT_MANIFEST.pattern
)
UNSEEN = {"ours": None, "recorded": UNSEEN_WITHOUT_MANIFEST, "bare": UNSEEN_AT_FIRST_SIGHT}


def assert_none_silent(outcomes: dict[str, str], unseen: re.Pattern[str] | None) -> None:
    silent = [
        name for name, result in outcomes.items() if result == "silent" and (unseen is None or not unseen.match(name))
    ]
    unclear = {name: result for name, result in outcomes.items() if result.startswith("unclear")}
    assert not silent
    assert not unclear


@pytest.mark.parametrize("mode", UNSEEN)
def test_damaged_datasets_sample(corpora: dict[str, Path], tmp_path: Path, mode: str) -> None:
    assert_none_silent(dataset_outcomes(corpora, tmp_path, mode, 17), UNSEEN[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", UNSEEN)
def test_damaged_datasets(corpora: dict[str, Path], tmp_path: Path, mode: str) -> None:
    outcomes = dataset_outcomes(corpora, tmp_path, mode, 1)
    print(mode, len(outcomes), count(outcomes), {n: r for n, r in outcomes.items() if r == "silent"})
    assert len(outcomes) > 500
    assert_none_silent(outcomes, UNSEEN[mode])


@pytest.mark.parametrize("step", [pytest.param(29, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_a_damaged_dataset_never_merges(corpora: dict[str, Path], tmp_path: Path, step: int) -> None:
    cases = [*damage.index_cases({}), *damage.bin_cases({}), *damage.side_file_cases("manifest.json")]
    output = tmp_path / "merged"
    outcomes = {}

    def merged(prefix: Path) -> list[list[list[int]]]:
        merge([corpora["another corpus"], prefix], output)
        return read(output)

    truth = read(corpora["another corpus"]) + read(corpora["true"])
    for number, (name, change) in enumerate(islice(cases, 0, None, step)):
        prefix = tmp_path / str(number) / "corpus"
        prefix.parent.mkdir()
        for suffix in SUFFIXES[:3]:
            shutil.copyfile(f"{corpora['true']}.{suffix}", f"{prefix}.{suffix}")
        change(prefix)
        outcomes[name] = outcome(partial(merged, prefix), truth, "corpus")
        assert idx_path(output).exists() == (outcomes[name] == "harmless"), name
        for left in tmp_path.glob("merged*"):
            assert outcomes[name] == "harmless", name
            left.unlink()
    print(len(outcomes), count(outcomes))
    assert_none_silent(outcomes, None)


def described(seed: int) -> dict[str, Any]:
    return {"corpus": seed, "prefix": "a directory " * 10}


def maps_of(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.integers(0, 99, 50) for name in ("document", "sample", "shuffle")}


@pytest.mark.parametrize("step", [pytest.param(13, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_damaged_index_maps_are_built_again(tmp_path: Path, step: int) -> None:
    """Where that cannot be, such as under a name that is no directory, there is one error."""

    def load(directory: Path, seed: int = 1) -> dict[str, list[int]]:
        maps = cached_maps(directory, described(seed), lambda: maps_of(seed))
        return {name: array.tolist() for name, array in maps.items()}

    truth = load(tmp_path / "true")
    load(tmp_path / "other", 2)
    other = tmp_path / "other" / digest(described(2))
    outcomes = {}
    for number, (name, change) in enumerate(islice(damage.map_cases(other), 0, None, step)):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "true", directory)
        change(directory / digest(described(1)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcomes[name] = outcome(partial(load, directory), truth, directory.name)
        missing = name in ("entry: missing",) or name.startswith("lock")
        warned = any("built again" in str(warning.message) for warning in caught)
        assert missing or outcomes[name] == "named" or warned, (name, outcomes[name])
        assert outcomes[name] in ("harmless", "named") or not name.startswith("entry"), name
    print(len(outcomes), count(outcomes))
    assert_none_silent(outcomes, None)


def test_damaged_progress_files(tmp_path: Path) -> None:
    truth = (3, [Position(70, 5, 4, 123, 456, 789)])
    outcomes = {}
    for number, (name, change) in enumerate(damage.progress_cases()):
        path = tmp_path / f"{number}.progress.json"
        save_progress(path, "job", *truth)
        change(path)
        outcomes[name] = outcome(partial(load_progress, path, "job", 1), truth, path.name)
        if name in ("dangling link", "empty") and outcomes[name] == "silent":
            outcomes[name] = "harmless" if load_progress(path, "job", 1) == (0, [Position()]) else "silent"
    print(len(outcomes), count(outcomes))
    assert_none_silent(outcomes, None)
