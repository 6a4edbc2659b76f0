"""``lightning-megatron config``: questions, in Accelerate's order and with its defaults, to a Hydra configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_megatron.cli.accelerate import Conversion, convert
from lightning_megatron.json_files import read_bounded
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner.hardware import unknown
from lightning_megatron.planner.presets import MODELS, model_preset
from lightning_megatron.planner.request import parse_value
from lightning_megatron.printable import printable

_GROUPS = ("model", "parallel", "data", "optim", "trainer", "logger")
_PRECISIONS = {"no": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}
Answers = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """One question, and the flag that answers it without asking."""

    name: str
    text: str
    kind: str
    """The answer's type, as :func:`~lightning_megatron.planner.request.parse_value` spells it."""
    default: Any
    asked: Callable[[Answers], bool] = lambda answers: True
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """``--tp-degree``."""
        return "--" + self.name.replace("_", "-")

    @property
    def spelled_default(self) -> str:
        """The default as the prompt shows it."""
        if self.kind == "bool":
            return "YES/no" if self.default else "yes/NO"
        return str(self.default)

    def parse(self, text: str) -> Any:
        """The answer in ``text``; an empty one is the default.

        Raises:
            ValueError: it is no answer to this question.
        """
        text = text.strip()
        if not text:
            return self.default
        value = parse_value(self.name, text, self.kind)
        if self.kind in ("int", "float") and value < (self.kind == "int"):
            raise ValueError(f"{self.name}={value}, but must be at least {int(self.kind == 'int')}.")
        if self.choices and value not in self.choices:
            raise unknown(self.name, value, self.choices)
        return value


QUESTIONS: tuple[Question, ...] = (
    # Accelerate's, in its order and words; "Do you want to use Megatron-LM?" is answered by being here.
    Question("tp_degree", "What is the Tensor Parallelism degree/size?", "int", 1),
    Question(
        "sequence_parallelism",
        "Do you want to enable Sequence Parallelism?",
        "bool",
        True,
        asked=lambda answers: answers["tp_degree"] > 1,
    ),
    Question("pp_degree", "What is the Pipeline Parallelism degree/size?", "int", 1),
    Question(
        "num_micro_batches",
        "What is the number of micro-batches?",
        "int",
        1,
        asked=lambda answers: answers["pp_degree"] > 1,
    ),
    Question("recompute_activations", "Do you want to enable selective activation recomputation?", "bool", True),
    Question(
        "use_distributed_optimizer",
        "Do you want to use distributed optimizer which shards optimizer state and gradients across data parallel "
        "ranks?",
        "bool",
        True,
    ),
    Question(
        "gradient_clipping",
        "What is the gradient clipping value based on global L2 Norm (0 to disable)?",
        "float",
        1.0,
    ),
    Question("num_gpus", "How many GPU(s) should be used for distributed training?", "int", 1),
    Question("mixed_precision", "Mixed precision: no, fp16 or bf16?", "str", "no", choices=("no", "fp16", "bf16")),
    # Ours.
    Question("model", "Which model?", "str", "gpt2_small", choices=tuple(MODELS)),
    Question("data_path", "Where is the data, an indexed dataset without .bin?", "str", "???"),
    Question("seq_length", "How many tokens per sequence?", "int", 0),
    Question("micro_batch_size", "How many sequences per micro-batch?", "int", 1),
    Question("max_steps", "How many optimizer steps?", "int", 1000),
    Question("lr", "What is the peak learning rate?", "float", 3e-4),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the command."""
    parser = subparsers.add_parser(
        "config",
        help="write a configuration, by questions or from an Accelerate file",
        description="Ask Accelerate's questions about Megatron-LM, then for model and data, and write a Hydra\n"
        "configuration for recipes/pretrain.py. A flag answers its question; --yes answers the others\n"
        "with their defaults.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", default="megatron.yaml", metavar="FILE", help="default: megatron.yaml")
    parser.add_argument("-y", "--yes", action="store_true", help="ask nothing")
    parser.add_argument("-f", "--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--from-accelerate", metavar="FILE", help="convert an Accelerate configuration of Megatron-LM")
    for question in QUESTIONS:
        shown = f"one of {', '.join(question.choices)}; " if question.choices else ""
        default = question.spelled_default if question.name != "seq_length" else "the model's longest"
        # Parsed by the question, so that a wrong flag reads as a wrong answer does.
        parser.add_argument(question.flag, metavar="VALUE", help=f"{question.text} {shown}[{default}]")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 0, or 2 for answers that do not fit, with the reason on standard error."""
    output = Path(args.output)
    try:
        if output.suffix not in (".yaml", ".yml"):
            raise ValueError(f"--output={output}, but a Hydra configuration must end in .yaml.")
        if output.exists() and not args.force:
            raise ValueError(f"{output} exists. Give --force to overwrite it, or another --output.")
        given = {
            question.name: question.parse(text)
            for question in QUESTIONS
            if (text := getattr(args, question.name)) is not None
        }
        if args.from_accelerate:
            settings = _from_accelerate(Path(args.from_accelerate), given)
        else:
            settings = settings_from(ask(given, interactive=not args.yes))
        config = build_config(settings)
        check(config)
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(to_yaml(config))
    print(f"Wrote {output}. To train with it:\n  {command(output)}")
    return 0


# ------------------------------------------------------------------- questions


def ask(given: Mapping[str, Any], *, interactive: bool) -> Answers:
    """All answers: those given, and for the others what is typed, or the defaults.

    Raises:
        ValueError: the input ends before the questions do.
    """
    answers: Answers = {}
    for question in QUESTIONS:
        if question.name in given:
            answers[question.name] = given[question.name]
        elif not question.asked(answers):
            answers[question.name] = question.default if question.kind != "bool" else False
        elif interactive:
            answers[question.name] = _ask_one(question, answers)
        else:
            answers[question.name] = question.default
    return answers


def _ask_one(question: Question, answers: Answers) -> Any:
    default = question.spelled_default
    if question.name == "seq_length":
        default = str(model_preset(answers["model"]).max_position_embeddings)
    while True:
        try:
            return question.parse(input(f"{question.text} [{default}]: "))
        except EOFError:
            raise ValueError(
                f"The input ended at {question.text!r}. Answer it with {question.flag}, or all the rest with --yes."
            ) from None
        except ValueError as error:
            print(error, file=sys.stderr)


def settings_from(answers: Answers) -> dict[str, Any]:
    """Answers to settings such as ``{"parallel.tensor_model_parallel_size": 2}``.

    Raises:
        ValueError: the GPUs cannot be divided this way.
    """
    layout = ParallelLayout(
        tensor_model_parallel_size=answers["tp_degree"], pipeline_model_parallel_size=answers["pp_degree"]
    )
    replicas = layout.data_parallel_size(answers["num_gpus"])
    return {
        **_model_settings(answers["model"]),
        "model.recompute_granularity": "selective" if answers["recompute_activations"] else None,
        "parallel.tensor_model_parallel_size": answers["tp_degree"],
        "parallel.pipeline_model_parallel_size": answers["pp_degree"],
        "parallel.sequence_parallel": answers["sequence_parallelism"],
        "parallel.micro_batch_size": answers["micro_batch_size"],
        "parallel.use_distributed_optimizer": answers["use_distributed_optimizer"],
        "data.data_path": answers["data_path"],
        "data.seq_length": answers["seq_length"] or model_preset(answers["model"]).max_position_embeddings,
        "data.global_batch_size": answers["micro_batch_size"] * answers["num_micro_batches"] * replicas,
        "optim.lr": answers["lr"],
        "optim.min_lr": 0.0,
        "optim.clip_grad": answers["gradient_clipping"],
        "trainer.devices": answers["num_gpus"],
        "trainer.num_nodes": 1,
        "trainer.max_steps": answers["max_steps"],
        "trainer.val_check_interval": min(1000, answers["max_steps"]),
        "trainer.limit_val_batches": 100,
        "precision": _PRECISIONS[answers["mixed_precision"]],
    }


def _model_settings(name: str) -> dict[str, Any]:
    # Every field, so that the file does not change its meaning with the preset that it started from.
    return {f"model.{field}": value for field, value in model_preset(name).as_dict().items()}


# ------------------------------------------------------------------ Accelerate


def _from_accelerate(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an Accelerate file; flags fill in what it does not hold. Reports every key on standard output."""
    import yaml

    if not path.is_file():
        raise ValueError(f"There is no file --from-accelerate={path}. `accelerate config` writes one.")
    try:
        text = read_bounded(path, 2**20).decode()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError(f"{path} has YAML aliases (*name), which can grow without bound. Write the values out.")
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no Accelerate configuration, but {type(document).__name__}.")
    takes = ("model", "data_path", "seq_length", "micro_batch_size", "max_steps", "lr")
    for name in given:
        if name not in takes:
            raise ValueError(
                f"--{name.replace('_', '-')} is decided by {path}. With --from-accelerate give only "
                f"{', '.join('--' + take.replace('_', '-') for take in takes)}."
            )
    answers = ask(given, interactive=False)
    # What neither the file nor a flag says is as if the questions had been answered with their defaults.
    defaults = settings_from(ask({name: given[name] for name in takes if name in given}, interactive=False))
    conversion = convert(
        document,
        num_layers=model_preset(answers["model"]).num_layers,
        micro_batch_size=answers["micro_batch_size"],
    )
    report(conversion)
    settings = defaults | {"model.recompute_granularity": None} | conversion.settings
    flags = {"seq_length": "data.seq_length", "max_steps": "trainer.max_steps"}
    settings |= {target: given[name] for name, target in flags.items() if name in given}
    if "trainer.val_check_interval" not in conversion.settings:
        settings["trainer.val_check_interval"] = min(1000, settings["trainer.max_steps"])
    return settings


def report(conversion: Conversion) -> None:
    """Print what became of every key."""
    for key, targets in conversion.translated.items():
        shown = ", ".join(f"{target}={conversion.settings.get(target)}" for target in targets)
        print(printable(f"{key}: {shown or 'the default here as well'}"))
    if conversion.untranslated:
        print("\nWithout a meaning here:")
    for entry in conversion.untranslated:
        print(printable(f"{entry.key}: {entry.value!s:.200}\n    {entry.reason}"))


# --------------------------------------------------------------------- writing


def build_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings to the tree of a Hydra root configuration that extends ``conf/pretrain.yaml``."""
    tree: dict[str, Any] = {
        "defaults": ["pretrain", {"override precision": settings.get("precision", "32-true")}, "_self_"]
    }
    for group in _GROUPS:
        values: dict[str, Any] = {}
        for path, value in settings.items():
            head, _, rest = path.partition(".")
            if head != group:
                continue
            node = values
            *parents, leaf = rest.split(".")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        if values:
            tree[group] = values
    return tree


def check(config: Mapping[str, Any]) -> None:
    """Refuse sizes that do not fit each other, before anything is written.

    Raises:
        ValueError: the first thing that does not fit.
    """
    model = GPTConfig(**config["model"])
    parallel, data, trainer = config["parallel"], config["data"], config["trainer"]
    names = ParallelLayout().as_dict()
    layout = ParallelLayout(**{name: value for name, value in parallel.items() if name in names})
    model.check_layout(layout)
    layout.check_sequence(data["seq_length"])
    if model.position_embedding_type == "learned_absolute" and data["seq_length"] > model.max_position_embeddings:
        raise ValueError(
            f"seq_length={data['seq_length']} is longer than the model's {model.max_position_embeddings} positions."
        )
    world_size = trainer["devices"] * trainer["num_nodes"]
    layout.check_global_batch(data["global_batch_size"], parallel["micro_batch_size"], world_size)


def to_yaml(config: Mapping[str, Any]) -> str:
    """The file's text."""
    import yaml

    return "# Extends conf/pretrain.yaml. Every field may still be overridden on the command line.\n" + yaml.safe_dump(
        dict(config), sort_keys=False, default_flow_style=False
    )


def command(path: Path) -> str:
    """How to train with the file at ``path``."""
    return f"lightning-megatron pretrain --config-dir {path.resolve().parent} --config-name {path.stem}"
