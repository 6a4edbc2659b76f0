"""`lightning-megatron report RUN`: one page that holds everything."""

from __future__ import annotations

import base64
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import lightning_megatron as lm
from lightning_megatron.checkpoint.metadata import CheckpointMetadata, FileSum
from lightning_megatron.cli.main import main
from lightning_megatron.errors import DataError
from lightning_megatron.optim.preview import learning_rates
from lightning_megatron.reporting.page import planned_rates, render
from lightning_megatron.reporting.run import read_run

CONFIG = """
model: {num_layers: 4}
parallel: {_target_: lightning_megatron.MegatronStrategy, tensor_model_parallel_size: 2, sequence_parallel: true}
optim: {_target_: lightning_megatron.OptimizerConfig, lr: 1.0e-3, lr_warmup_steps: 10}
trainer: {max_steps: 100}
note: "<script>alert(1)</script>"
"""
REFERENCES = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "background", "cite", "manifest"}
"""Attributes that make a browser load something, or go there."""
ELSEWHERE = {"script", "link", "iframe", "object", "embed", "base", "audio", "video", "form"}
SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags that nest, texts, pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.alts: list[str] = []
        self.handlers: list[str] = []
        self.styles: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [str(given["id"])] if "id" in given else []
        self.sources += [str(value) for name, value in attrs if name in REFERENCES]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.alts += [str(given.get("alt"))] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.styles if self.open[-1:] == ["style"] else self.texts).append(data)


def write_run(directory: Path, steps: int = 100) -> Path:
    log = directory / "csv" / "version_0"
    log.mkdir(parents=True)
    rows = [
        "step,epoch,train_loss,val_loss,tokens_per_s,mfu,data_time,schedule_time,optimizer_time,memory/rank_0,lr-MegatronOptimizer/pg1"
    ]
    for step in range(9, steps, 10):
        rows.append(f"{step},0,{5 - step / 100},,{1000 + step},0.4,0.01,0.2,0.05,1.5,{1e-3 * step / 100}")
    rows.append(f"{steps - 1},0,,4.2,,,,,,,")
    (log / "metrics.csv").write_text("\n".join(rows) + "\n")
    (directory / "config.yaml").write_text(CONFIG)
    whole = directory / "checkpoints" / "last.ckpt"
    whole.mkdir(parents=True)
    CheckpointMetadata(
        model={"module": "GPTModule"}, layout={"tensor_model_parallel_size": 2}, world_size=2,
        versions={"torch": "2.11"}, files={"a": FileSum(2**20, 1)},
    ).write(whole)  # fmt: skip
    (directory / "checkpoints" / "step=3.ckpt").mkdir()
    return directory


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    page = Page(render(read_run(write_run(tmp_path / "run"))))
    assert page.open == []
    assert page.tags[:2] == ["html", "head"]
    assert {"summary", "curves", "layout", "checkpoints", "configuration"} <= set(page.ids)
    assert not ELSEWHERE & set(page.tags)
    assert page.handlers == []
    assert len(page.ids) == len(set(page.ids))
    assert len(page.styles) == 1
    assert "url(" not in page.styles[0]
    assert "@import" not in page.styles[0]
    assert len(page.sources) == len(page.alts) == 6
    for source in page.sources:
        check_picture(source)
    for title in ("Loss:", "Learning rate:", "Throughput:", "MFU:", "Where a step's time goes:", "Memory by rank:"):
        assert any(alt.startswith(title) for alt in page.alts), title
    text = " ".join(page.texts)
    assert "best 4.2000" in text
    assert "perplexity 66.7" in text
    for number in ("4.0100 in the last step logged", "1,054 tokens/s", "40.0%", "GPTModule", "torch 2.11", "1.0 MiB"):
        assert number in text, number
    for end in ("train_loss 4.01 at", "tokens_per_s 1099 at", "schedule_time 0.2 at", "memory/rank_0 1.5 at"):
        assert end in text, end
    assert "tensor_model_parallel_size" in text
    assert "not whole" in text
    assert "<script>alert(1)</script>" in text  # as text, not as a tag


def check_picture(source: str) -> None:
    """An SVG inside of the page, with a drawn curve and references to its own parts alone."""
    kind, _, data = source.partition(",")
    assert kind == "data:image/svg+xml;base64"
    root = ElementTree.fromstring(base64.b64decode(data, validate=True))
    assert root.tag == f"{SVG}svg"
    assert len(root.attrib["viewBox"].split()) == 4
    elements = list(root.iter())
    assert not {"script", "image", "foreignObject"} & {element.tag.removeprefix(SVG) for element in elements}
    drawn = [element.attrib["d"] for element in elements if element.tag == f"{SVG}path"]
    assert any(path.count("L") >= 9 for path in drawn)  # ten logged steps
    for element in elements:
        for name, value in element.attrib.items():
            assert not name.endswith("href") or value.startswith("#")
            assert "url(" not in value or "url(#" in value


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert "100 steps" in capsys.readouterr().out
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(run), "-o", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").is_file()
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "There is no directory" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "logger=csv" in capsys.readouterr().err


def test_a_run_that_resumed_is_one_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    second = tmp_path / "csv" / "version_1"
    second.mkdir()
    (second / "metrics.csv").write_text("step,train_loss\n59,1.0\n69,2.0\n")
    losses = dict(read_run(tmp_path).series["train_loss"])
    assert losses[49] == pytest.approx(4.51)
    assert losses[59] == 1.0
    assert 79 not in losses  # redone by the later start


def test_tensorboards_files_are_read_too(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step in range(3):
            writer.add_scalar("train_loss", 3 - step, step)
    run = read_run(tmp_path)
    assert run.series == {"train_loss": ((0, 3.0), (1, 2.0), (2, 1.0))}
    assert Page(render(run)).open == []


def test_values_that_cannot_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train_loss,val_loss\n0,nan,inf\n1,2.0,nan\n")
    assert Page(render(read_run(tmp_path))).open == []
    (tmp_path / "metrics.csv").write_text("step,train_loss\n")
    with pytest.raises(DataError, match="Nothing was logged"):
        read_run(tmp_path)


def test_the_planned_schedule_is_drawn_beside_the_logged_one() -> None:
    config = {"optim": {"_target_": "x", "lr": 1e-3, "lr_warmup_steps": 10}, "trainer": {"max_steps": 100}}
    assert planned_rates(config) == tuple(learning_rates(lm.OptimizerConfig(lr=1e-3, lr_warmup_steps=10), 100))
    assert planned_rates({**config, "trainer": {"max_steps": -1}}) == ()
    assert planned_rates({}) == ()
    assert planned_rates({**config, "optim": {"lr": -1}}) == ()


@pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), reason="no browser is installed"
)
def test_a_browser_shows_it(tmp_path: Path) -> None:
    import subprocess

    run = write_run(tmp_path / "run")
    main(["report", str(run)])
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{run}/report.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert 'id="curves"' in dom


# ----------------------------------------------------------------------------------------------------------- schedule


class Stub:
    """As much of an optimizer as megatron-core's scheduler asks for."""

    chained_optimizers: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0}]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    "changes",
    [
        {"lr_decay_style": "constant"},
        {"lr_decay_style": "linear"},
        {"lr_decay_style": "cosine", "lr_decay_steps": 30},
        {"lr_decay_style": "inverse-square-root", "lr_warmup_init": 1e-5},
        *({"lr_decay_style": "WSD", "lr_wsd_decay_steps": 12, "lr_wsd_decay_style": style}
          for style in ("exponential", "linear", "cosine", "minus_sqrt")),
    ],
)  # fmt: skip
def test_the_preview_is_what_training_does(changes: dict[str, Any], warmup: int) -> None:
    from lightning_megatron.optim.optimizer import MegatronOptimizer, MegatronScheduler

    config = lm.OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_steps=warmup, **changes)
    optimizer = MegatronOptimizer(Stub())
    scheduler = MegatronScheduler.build(optimizer, config, 40)
    rates = []
    for _ in range(41):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert [rate for _, rate in learning_rates(config, 40)] == pytest.approx(rates, rel=1e-12)


def test_the_schedule_command(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "plots" / "lr.svg"
    assert main(["schedule", "max_steps=1000", "optim.lr=1e-3", "lr_warmup_steps=100", "-o", str(output)]) == 0
    assert ElementTree.parse(output).getroot().tag.endswith("svg")
    out = capsys.readouterr().out
    assert "1.000e-03" in out
    assert out.splitlines()[-2].split() == ["step", "1,000", "3.000e-05"]  # where conf/optim ends, and so `pretrain`
    for wrong, message in (
        ([], "Which schedule?"),
        (["lr=1"], "Give max_steps"),
        (["max_steps=10", "learning_rat=1"], "is not known"),
        (["max_steps=ten"], "is not a whole number"),
        (["max_steps=10", "lr_decay_style=cosin"], "Did you mean 'cosine'"),
        (["max_steps=10", "-o", "x.png"], "is an .svg file"),
        (["max_steps=10", "lr_warmup_steps=10"], "lr_warmup_steps=10 is not smaller than max_steps=10"),
    ):
        assert main(["schedule", *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        "[" * 5000,
        "a: &a [1]\nb: *a\n",
        "optim: {lr: {a: 1}}\ntrainer: {max_steps: 10}\n",
        "optim: {lr: 0.1, lr_decay_style: [cosine]}\ntrainer: {max_steps: 10}\n",
        "optim: {lr: 0.1, lr_warmup_steps: x}\ntrainer: {max_steps: 10}\n",
        "optim: {lr: .nan}\ntrainer: {max_steps: 1000000000000000000}\n",
        "parallel: {1: {2: [3]}, null: 4}\noptim: [1]\n",
        "trainer: {max_steps: {a: 1}}\noptim: {lr: 1}\n",
        "!!python/object/apply:os.system [touch ran]\n",
        "\x00\x1b[2J",
        "- 1",
    ],
)
def test_configurations_that_no_run_wrote(config: str, tmp_path: Path) -> None:
    """A page is made all the same: curves are in other files."""
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text(config)
    page = render(read_run(tmp_path))
    Page(page)
    assert "5,000" not in page


def test_damaged_logs_are_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    log = tmp_path / "csv" / "version_0" / "metrics.csv"
    text = log.read_text()
    for damage in ("1e999,0,1.0\n", "x,0,1.0\n", "nan,0,1\n"):
        log.write_text(text + damage)
        with pytest.raises(DataError, match=r"metrics.csv is damaged behind row"):
            read_run(tmp_path)
