"""``lightning-megatron doctor``: the environment, kernels and a short run; with checkpoints, whether they are whole."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_megatron.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_megatron.diagnosis import Finding
    from lightning_megatron.diagnosis.selftest import SelfTest

_MOST_DEVICES = 4


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="environment, kernels and a self-test, or checkpoints",
        description="Without arguments: look at this machine, say which kernels run and why, and train a few steps at "
        "each kind of parallelism, in about 20 seconds. With checkpoints: verify every byte, list what they hold, "
        "name what is damaged. The exit code is 1 if there is a problem.",
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CKPT", help="checkpoint directories")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto", help="of the self-test")
    parser.add_argument("--devices", type=int, metavar="N", help="processes of the self-test (default: 2, or all GPUs)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds until the self-test counts as hanging (60)"
    )
    parser.add_argument("--no-self-test", action="store_true", help="only look")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine the machine, or each checkpoint. Returns 1 if anything is wrong, 2 for arguments that do not fit."""
    if args.checkpoints:
        healthy = [_examine(path) for path in args.checkpoints]
        return 0 if all(healthy) else 1
    if args.devices is not None and args.devices < 1:
        print(f"error: --devices={args.devices}, but must be at least 1.", file=sys.stderr)
        return 2
    if not args.timeout > 0:
        print(f"error: --timeout={args.timeout}, but must be above 0.", file=sys.stderr)
        return 2
    return _examine_machine(args)


# ----------------------------------------------------------------------------------------------------------- machine


def _examine_machine(args: argparse.Namespace) -> int:
    from rich.console import Console

    from lightning_megatron.diagnosis import Status
    from lightning_megatron.diagnosis.environment import environment

    console = Console(highlight=False, soft_wrap=True)
    findings = environment()
    console.print("Environment", style="bold")
    _print(console, findings)
    # Without its packages the rest cannot be asked.
    if all(finding.status is not Status.PROBLEM for finding in findings):
        console.print("\nKernels", style="bold")
        findings += (broken := _print_kernels(console))
        if not args.no_self_test and not broken:
            console.print("\nSelf-test", style="bold")
            findings += _selftest(console, args.accelerator, args.devices, args.timeout)
    problems = [finding for finding in findings if finding.status is Status.PROBLEM]
    console.print()
    if problems:
        names = ", ".join(finding.name for finding in problems)
        console.print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}: {names}", style="bold red")
        return 1
    console.print("No problem found.", style="bold green")
    return 0


def _print(console: Console, findings: list[Finding]) -> None:
    marks = {"ok": "[green]ok     [/]", "note": "[yellow]note   [/]", "problem": "[bold red]problem[/]"}
    from rich.markup import escape

    for finding in findings:
        console.print(f"  {marks[finding.status.value]} {finding.name:<20} {escape(finding.detail)}")
        if finding.remedy:
            console.print(f"          {'':<20} -> {escape(finding.remedy)}")


def _print_kernels(console: Console) -> list[Finding]:
    """The table of kernels; a problem instead if the models cannot be imported."""
    from rich.markup import escape

    from lightning_megatron.backends import report
    from lightning_megatron.diagnosis.finding import problem

    try:
        kernels = report()
    except Exception as error:  # any: what megatron-core imports may fail in its own ways
        remedy = "python -c 'import megatron.core' shows where; pip install --force-reinstall megatron-core"
        found = [problem("megatron-core", f"installed, but cannot be imported: {error}", remedy)]
        _print(console, found)
        return found
    for kernel in kernels:
        console.print(f"  {kernel.part:<28} {escape(kernel.choice)}  [dim]({escape(kernel.why)})[/]")
    return []


def _selftest(console: Console, accelerator: str, devices: int | None, timeout: float) -> list[Finding]:
    import torch

    from lightning_megatron.diagnosis.selftest import run_selftest

    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if devices is None:
        devices = min(_MOST_DEVICES, torch.cuda.device_count()) if accelerator == "cuda" else 2
    findings = _selftest_findings(run_selftest(accelerator, devices, timeout))
    _print(console, findings)
    return findings


def _selftest_findings(result: SelfTest) -> list[Finding]:
    from lightning_megatron.diagnosis.finding import ok, problem

    where = f"{result.devices} process{'es' if result.devices > 1 else ''} on {result.accelerator}"
    backend = "NCCL_DEBUG=INFO" if result.accelerator == "cuda" else "GLOO_SOCKET_IFNAME=lo"
    remedy = f"Run it again with {backend} set. A firewall between ports of this machine, or a device that another "
    remedy += "process holds, makes collectives fail or hang."
    if result.error:
        return [problem("training", f"{where}: {result.error}", remedy)]
    findings = []
    for trial in result.trials:
        name = {"tp1": f"data parallel {result.devices}"}.get(trial.layout, trial.layout)
        if trial.error:
            findings.append(problem(name, trial.error, remedy))
        elif not trial.healthy:
            losses = ", ".join(f"{loss:.4f}" for loss in trial.losses)
            findings.append(
                problem(name, f"the loss does not fall: {losses}", "Please report it with this whole output.")
            )
        else:
            detail = f"loss {trial.losses[0]:.4f} to {trial.losses[-1]:.4f} in {trial.seconds:.1f} s"
            findings.append(ok(name, detail))
    if result.disagreement > result.tolerance:
        findings.append(
            problem(
                "agreement",
                f"losses differ by {result.disagreement:.1e} between layouts or ranks, more than {result.tolerance}",
                "Please report it with this whole output: a layout computes something else.",
            )
        )
    else:
        findings.append(ok("agreement", f"losses differ by {result.disagreement:.1e}; {where}, {result.seconds:.0f} s"))
    return findings


# ------------------------------------------------------------------------------------------------------- checkpoints


def _examine(path: Path) -> bool:
    from lightning_megatron.checkpoint.integrity import contents, refused, verify

    damage = verify(path)
    if problems := damage or refused(path):
        print(f"{path}: {'DAMAGED' if damage else 'WHOLE, BUT NOT LOADED BY DEFAULT'}", file=sys.stderr)
        for line in problems:
            print(printable(f"  {line}"), file=sys.stderr)
        return False
    found = contents(path)
    metadata = found.metadata
    layout = ", ".join(f"{name}={value}" for name, value in metadata.layout.items() if value not in (None, False, 1))
    print(f"{path}: whole, {found.size / 2**20:.1f} MiB in {len(metadata.files)} files, all checksums match")
    model = printable(str(metadata.model.get("module", "?")))
    print(f"  model      {model}, {found.parameters:,} elements in {found.weights} tensors")
    if metadata.tokenizer:
        kind, size = metadata.tokenizer.get("class", "?"), metadata.tokenizer.get("vocab_size", "?")
        tokens = f"{size:,}" if isinstance(size, int) else size
        source = metadata.tokenizer.get("source") or "made in memory"
        print(printable(f"  tokenizer  {kind} of {tokens} tokens, {source}"))
    print(f"  optimizer  {', '.join(found.optimizer) or 'none: weights only'}")
    print(f"  written on {metadata.world_size} ranks{printable(', ' + layout) if layout else ''}")
    print(f"  random     states of {found.random_states} ranks")
    print(printable(f"  versions   {', '.join(f'{name} {number}' for name, number in metadata.versions.items())}"))
    return True
