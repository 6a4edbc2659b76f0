import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_megatron.data import FineTuningData, HuggingFaceData, InstructionDataset, InstructionSamples
from lightning_megatron.data.finetuning import pack
from lightning_megatron.data.tokenizer import load_tokenizer
from lightning_megatron.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Any:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def instructions(texts: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    lines = [{"prompt": text[:20], "completion": text[20 : 40 + 3 * index]} for index, text in enumerate(texts[:60])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_packing_fills_bins() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    bins = pack(lengths, 128)
    assert sorted(item for chosen in bins for item in chosen) == list(range(500))
    assert all(sum(lengths[chosen]) <= 128 for chosen in bins)
    assert len(bins) <= 1.02 * np.ceil(lengths.sum() / 128)


def test_each_example_is_as_if_it_were_alone(instructions: Path, tokenizer: Any) -> None:
    packed = InstructionDataset(instructions, tokenizer, 256)
    alone = InstructionDataset(instructions, tokenizer, 256, InstructionSamples(pack=False))
    assert len(alone) == 60
    assert len(packed) < 35
    seen = []
    for index in range(len(packed)):
        sample = packed[index]
        assert {key: tuple(value.shape) for key, value in sample.items()} == dict.fromkeys(sample, (256,))
        for number, example in enumerate(packed.examples(index)):
            place = sample["document_ids"] == number
            (single,) = [s for s in range(60) if alone.examples(s) == [example]]
            for key in ("tokens", "labels", "loss_mask", "position_ids"):
                assert torch.equal(sample[key][place], alone[single][key][: int(place.sum())]), key
            seen.append(example)
        assert float(sample["loss_mask"][sample["document_ids"] == len(packed.examples(index))].sum()) == 0
    assert sorted(seen) == list(range(60))


def test_only_the_answer_and_its_end_are_learned(instructions: Path, tokenizer: Any) -> None:
    dataset = InstructionDataset(instructions, tokenizer, 256, InstructionSamples(pack=False))
    line = json.loads(instructions.read_text().splitlines()[7])
    sample = dataset[7]
    learned = sample["labels"][sample["loss_mask"] > 0].tolist()
    assert tokenizer.decode(learned) == line["completion"] + "<|endoftext|>"
    prompt = len(tokenizer(line["prompt"])["input_ids"])
    assert tokenizer.decode(sample["tokens"][:prompt]) == line["prompt"]
    everything = InstructionDataset(instructions, tokenizer, 256, InstructionSamples(pack=False, loss_on_prompt=True))
    assert everything[7]["loss_mask"].sum() == len(learned) + prompt - 1


def test_chat_messages(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "that"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "this"},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    sample = InstructionDataset(path, tokenizer, 128)[0]
    tokenizer.chat_template = None
    assert tokenizer.decode(sample["labels"][sample["loss_mask"] > 0]) == "that<|endoftext|>this<|endoftext|>"


class TestErrors:
    def write(self, tmp_path: Path, line: str) -> Path:
        path = tmp_path / "bad.jsonl"
        path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
        return path

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", r"line 2, is not JSON"),
            ('{"prompt": "a"}', r"line 2: an example needs a prompt .* it has prompt"),
            ('{"messages": []}', r"line 2: messages need a tokenizer with a chat template"),
        ],
    )
    def test_a_bad_line_is_named(self, tokenizer: Any, tmp_path: Path, line: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            InstructionDataset(self.write(tmp_path, line), tokenizer, 64)

    def test_too_long(self, tokenizer: Any, tmp_path: Path) -> None:
        path = self.write(tmp_path, json.dumps({"prompt": "a", "completion": "word " * 200}))
        with pytest.raises(DataError, match=r"line 2: \d+ tokens, seq_length=64 takes 65"):
            InstructionDataset(path, tokenizer, 64, InstructionSamples(too_long="error"))
        kept = {
            how: InstructionDataset(path, tokenizer, 64, InstructionSamples(False, False, how))
            for how in ("truncate", "skip")
        }  # type: ignore[arg-type]
        assert {how: len(dataset) for how, dataset in kept.items()} == {"truncate": 2, "skip": 1}
        assert kept["truncate"][1]["loss_mask"].sum() == 64

    def test_missing_file(self, tokenizer: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            InstructionDataset(tmp_path / "no.jsonl", tokenizer, 64)


def test_fine_tuning_data(instructions: Path, tokenizer_dir: Path) -> None:
    module = FineTuningData(
        instructions,
        valid_path=instructions,
        tokenizer=tokenizer_dir,
        seq_length=256,
        global_batch_size=4,
        num_workers=0,
    )
    module.setup("fit")
    loader = module.train_dataloader()
    assert next(iter(loader))["document_ids"].shape == (4, 256)
    assert loader.batch_sampler.first_shuffled_epoch == 0
    assert len(module.val_dataloader()) == len(loader)
    assert module.test_dataloader() == []


class TestHuggingFaceData:
    def data(self, dataset: Any, tokenizer_dir: Path, tmp_path: Path, **options: Any) -> HuggingFaceData:
        defaults = {"block_size": 64, "global_batch_size": 48, "num_workers": 0, "cache_dir": tmp_path / "cache"}
        return HuggingFaceData(dataset, tokenizer=tokenizer_dir, **(defaults | options))

    @pytest.mark.slow
    def test_blocks_equal_hugging_faces_grouping(self, texts, tokenizer, tokenizer_dir: Path, tmp_path: Path) -> None:
        import datasets

        splits = datasets.DatasetDict(
            train=datasets.Dataset.from_dict({"text": texts[:100]}),
            validation=datasets.Dataset.from_dict({"text": texts[100:]}),
        )
        splits.save_to_disk(str(tmp_path / "saved"))
        ids = [token for text in texts[:100] for token in tokenizer(text)["input_ids"]]
        for source in (splits, tmp_path / "saved"):
            module = self.data(source, tokenizer_dir, tmp_path)
            module.setup("fit")
            dataset: Any = module.datasets["train"]
            assert len(dataset) == len(ids) // 64
            for index in (0, 5, len(dataset) - 1):
                block = ids[index * 64 : (index + 1) * 64]
                sample = dataset[index]
                assert sample["tokens"].tolist() == block
                # Those that transformers' loss compares: all but the first token.
                assert sample["labels"][sample["loss_mask"] > 0].tolist() == block[1:]
            assert len(module.train_dataloader()) == -(-len(dataset) // 48)
            assert module.datasets["valid"] is not None

    def test_columns_and_splits(self, texts: list[str], tokenizer_dir: Path, tmp_path: Path) -> None:
        import datasets

        rows = datasets.Dataset.from_dict({"text": texts, "title": texts, "id": range(len(texts))})
        with pytest.raises(DataError, match=r"columns text, title, id, of which text, title hold text"):
            self.data(rows, tokenizer_dir, tmp_path).setup("fit")
        self.data(rows, tokenizer_dir, tmp_path, text_column="title").setup("fit")
        with pytest.raises(DataError, match="no split train; it has test"):
            self.data({"test": rows}, tokenizer_dir, tmp_path).setup("fit")
        with pytest.raises(DataError, match=r"tokens, fewer than one block of block_size=10000000"):
            self.data(rows, tokenizer_dir, tmp_path, text_column="text", block_size=10_000_000).setup("fit")

    def test_the_guides_example_has_49_steps(self) -> None:
        from lightning_megatron.data.huggingface import BlockDataset
        from lightning_megatron.data.sampler import GlobalBatchSampler

        blocks = BlockDataset(np.zeros(2318 * 8 + 5, dtype=np.int32), 8)
        assert len(blocks) == 2318
        assert len(GlobalBatchSampler(len(blocks), 48)) == 49


class TestSpecialTokens:
    """Prompts begin as transformers' call of the tokenizer begins them, and so as `generate` gets them."""

    def tokenizers(self, tokenizer_dir: Path) -> dict[str, Any]:
        from tokenizers import processors

        bos, end = "<|endoftext|>", "[END]"
        templates = {"none": None, "bos": f"{bos} $A", "end": f"$A {end}", "both": f"{bos} $A {end}"}
        made = {}
        for name, template in templates.items():
            tokenizer = load_tokenizer(tokenizer_dir)
            tokenizer.add_special_tokens({"pad_token": end})
            ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, end)]
            if template is not None:
                tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                    single=template, pair=f"{template} $B", special_tokens=ids
                )
            made[name] = tokenizer
        return made

    def test_prompts(self, tokenizer_dir: Path, tmp_path: Path) -> None:
        path = tmp_path / "train.jsonl"
        path.write_text('{"prompt": "What is this?", "completion": " A text."}\n')
        options = InstructionSamples(pack=False)
        for name, tokenizer in self.tokenizers(tokenizer_dir).items():
            sample = InstructionDataset(path, tokenizer, 64, options)[0]
            length = int((sample["document_ids"] == 0).sum())
            tokens = [*sample["tokens"][:length].tolist(), int(sample["labels"][length - 1])]
            prompt = tokenizer("What is this?")["input_ids"]
            if name in ("end", "both"):  # an end token ends an answer, not a prompt
                prompt = prompt[:-1]
            answer = tokenizer(" A text.", add_special_tokens=False)["input_ids"]
            assert tokens == [*prompt, *answer, tokenizer.eos_token_id], name
            assert sample["loss_mask"][:length].sum() == len(answer) + 1, name

    @pytest.mark.parametrize("begin", ["", "{{ bos_token }}"])
    def test_chat_templates_add_their_own(self, begin: str, tokenizer_dir: Path, tmp_path: Path) -> None:
        tokenizer = self.tokenizers(tokenizer_dir)["bos"]
        tokenizer.chat_template = begin + "{% for m in messages %}[{{ m.role }}]{{ m.content }}[END]{% endfor %}"
        messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
        path = tmp_path / "chat.jsonl"
        path.write_text(json.dumps({"messages": messages}) + "\n")
        sample = InstructionDataset(path, tokenizer, 64)[0]
        length = int((sample["document_ids"] == 0).sum())
        expected = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert [*sample["tokens"][:length].tolist(), int(sample["labels"][length - 1])] == expected
        assert expected.count(tokenizer.bos_token_id) == bool(begin)


def test_examples_that_do_not_fit_are_counted(tokenizer: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    path, long = tmp_path / "train.jsonl", "word " * 200
    lines = [("a", "b"), (long, "b"), (long, "c"), ("a", long), ("a", "")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in lines))
    with pytest.warns(UserWarning, match=r"train.jsonl: of 5 examples, 2 are left out because their prompts alone"):
        cut = InstructionDataset(path, tokenizer, 64)
    assert vars(cut.counts) == {"examples": 5, "truncated": 1, "without_answer": 2, "skipped": 0}
    for _ in range(2):  # built, and from the cache
        with pytest.warns(UserWarning, match=r"3 are left out because they are longer than seq_length=64.*Raise seq_l"):
            skipped = InstructionDataset(path, tokenizer, 64, InstructionSamples(too_long="skip"))
        assert vars(skipped.counts) == {"examples": 5, "truncated": 0, "without_answer": 0, "skipped": 3}
    module = FineTuningData(path, tokenizer=tokenizer_dir, seq_length=64, global_batch_size=1, num_workers=0)
    with pytest.warns(UserWarning, match="1 are cut at seq_length=64") as told:
        module.setup("fit")
    assert len([warning for warning in told if "train.jsonl" in str(warning.message)]) == 1
    assert module.example_counts["train"] == cut.counts
    path.write_text(json.dumps({"prompt": long, "completion": "b"}) + "\n")
    with pytest.raises(DataError, match=r"of 1, 1 have no room for an answer"):
        InstructionDataset(path, tokenizer, 64)
