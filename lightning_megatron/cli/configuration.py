"""Hydra configurations of recipes: where they are, and one clear error for a name or a type that is wrong."""

from __future__ import annotations

import difflib
import functools
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lightning_megatron
from lightning_megatron.cli import targets
from lightning_megatron.cli.field_types import fits, parameters, spell
from lightning_megatron.cli.run_directory import claimed
from lightning_megatron.errors import CheckpointError, DataError, LayoutError, ModuleError
from lightning_megatron.printable import printable

_OPTIONS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)
"""Of Hydra 1.3."""


class ConfigurationError(ValueError):
    """A configuration that names a field that does not exist, or gives it a value of another type."""


_OURS = (ConfigurationError, LayoutError, ModuleError, DataError, CheckpointError)


def conf_dir() -> Path:
    """The directory of the configurations: inside an installed package, or beside it in a checkout."""
    package = Path(lightning_megatron.__file__).parent
    for directory in (package / "conf", package.parent / "conf"):
        if (directory / "pretrain.yaml").is_file():
            return directory
    raise ConfigurationError(f"No conf/ with pretrain.yaml in {package} or beside it. Install the package again.")


def recipe(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """``hydra.main`` on our configurations, which says of a mistake what is wrong and what is near.

    A mistake in the configuration ends the process with exit code 2, before anything starts; an error of this package
    (a layout, data, a checkpoint that does not fit) with 1. Both print one message, without a traceback.
    """

    def decorate(function: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(function)
        def checked(config: DictConfig) -> None:
            with _messages():
                _separate_jobs(config)
                check(config, targets.typed(HydraConfig.get().overrides.task))
                # Lightning warns of data that has no validation part, which is no mistake.
                warnings.filterwarnings("ignore", message="Total length of `ReplicaDataLoader` across ranks is zero")
                with claimed(config):
                    function(config)

        run = hydra.main(config_path=str(conf_dir()), config_name=config_name, version_base="1.3")(checked)

        def main() -> None:
            with _messages():
                _check_arguments(config_name, sys.argv[1:])
            run()

        return main

    return decorate


def answer_early(config_name: str, arguments: Sequence[str]) -> bool:
    """Whether a recipe's command line asks for help alone, which is then given.

    A mistake that can be seen without torch and Lightning, whose import takes seconds, ends the process here.
    """
    if any(argument in ("--help", "-h", "--hydra-help", "--version") for argument in arguments):
        hydra.main(config_path=str(conf_dir()), config_name=config_name, version_base="1.3")(lambda config: None)()
        return True
    with _messages():
        overrides = _check_arguments(config_name, arguments)
        if not any(argument.startswith("-") for argument in arguments):  # options may add directories
            _check_missing(_compose(config_name, overrides))
    return False


def _check_arguments(config_name: str, arguments: Sequence[str]) -> list[str]:
    """The overrides among the arguments, if they and the options exist."""
    _check_words(arguments)
    overrides = [argument for argument in arguments if _is_override(argument)]
    directories = _config_dirs(arguments)
    check_overrides(config_name, overrides, directories)
    if directories or any(override.startswith("hydra.searchpath") for override in overrides):
        root = [*_values(arguments, "--config-name", "-cn"), config_name][0]
        _check_hydra(root, overrides, directories)
    return overrides


def _check_hydra(root: str, overrides: Sequence[str], directories: Sequence[Path]) -> None:
    """Raise :class:`ConfigurationError` if files of the user's directories let Hydra itself make objects that are not
    its own, which it does before the recipe runs."""
    lines = _one_of_each([_parsed(override) for override in overrides])
    node = _compose(root, lines, directories, with_hydra=True).hydra
    own = targets.typed(overrides)
    for path, found in _targets(node, "hydra"):
        if reason := targets.refusal(_value(found, "_target_", f"{path}._target_"), path, own, targets.HYDRA):
            raise ConfigurationError(reason)


def _values(arguments: Sequence[str], *options: str) -> list[str]:
    """Values of an option, written with or without ``=``."""
    found = []
    for argument, after in zip(arguments, [*arguments, ""][1:], strict=True):
        option, given, value = argument.partition("=")
        if option in options:
            found.append(value if given else after)
    return found


def _config_dirs(arguments: Sequence[str]) -> list[Path]:
    """Directories of configurations that ``--config-dir`` adds."""
    found = [Path(value).absolute() for value in _values(arguments, "--config-dir", "-cd", "--config-path", "-cp")]
    missing = [path for path in found if not path.is_dir()]
    if missing:
        raise ConfigurationError(f"--config-dir {missing[0]} is no directory.")
    return found


def _separate_jobs(config: DictConfig) -> None:
    """Give each job of a sweep its own directory below ``run_dir``, unless ``run_dir`` tells them apart by itself."""
    job = HydraConfig.get()
    own = any(override.startswith("run_dir=") and "${hydra" in override for override in job.overrides.task)
    if job.mode == RunMode.MULTIRUN and "run_dir" in config and not own:
        config.run_dir = str(Path(config.run_dir) / str(job.job.num))


def _check_words(arguments: Sequence[str]) -> None:
    """Raise :class:`ConfigurationError` for a word that is neither an override nor an option or its value."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in _OPTIONS:
            near = difflib.get_close_matches(option, _OPTIONS, n=1, cutoff=0.75)
            raise ConfigurationError(
                f"{option} is no option."
                + (f" Did you mean {near[0]}?" if near else "")
                + " Fields are written without dashes, as in model=gpt_tiny or trainer.max_steps=10; --help lists them."
            )
        if "=" not in argument and not argument.startswith(("-", "~")) and not before.startswith("-"):
            raise ConfigurationError(
                f"{argument!r} is not field=value, such as model=gpt_tiny or trainer.max_steps=10."
            )


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


@contextmanager
def _messages() -> Iterator[None]:
    """End the process with a message for the errors that the user is to mend; SystemExit passes through Hydra."""
    try:
        yield
    except Exception as error:
        # Hydra wraps what an object that it makes raises: a ValueError there is about a field of the configuration.
        kinds = (*_OURS, ValueError) if isinstance(error, InstantiationException) else _OURS
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, kinds):
            cause = cause.__cause__
        message = _of_lightning(error) if cause is None else str(cause)
        if message is None:
            raise
        # One write, since ranks that fail together share the terminal.
        sys.stderr.write(f"error{_rank()}: {printable(message)}\n")
        sys.stderr.flush()
        sys.exit(2 if isinstance(cause, ConfigurationError) else 1)


def _of_lightning(error: Exception) -> str | None:
    """What Lightning says against an argument, or a package that is missing, of an object that Hydra makes."""
    if not isinstance(error, InstantiationException):
        return None
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (MisconfigurationException, ModuleNotFoundError)):
        cause = cause.__cause__
    if cause is None:
        return None
    field, said = str(error).rpartition("full_key: ")[2], str(cause).strip()
    if isinstance(cause, ModuleNotFoundError):
        return f"{field}: {said}"
    return f"{field}: {said} Change {field}.*, which --cfg job --package {field} shows."


def _rank() -> str:
    """Which process speaks, unless it is the first or the only one."""
    if "lightning.pytorch" not in sys.modules:
        return ""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    return f" on rank {rank}" if rank else ""


# ------------------------------------------------------------------------------------------------------- overrides


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of a recipe with overrides, checked.

    Raises:
        ConfigurationError: a field, an option of a group, or a type that does not exist or fit.
    """
    check_overrides(config_name, overrides)
    config = _compose(config_name, overrides)
    check(config, targets.typed(overrides))
    return config


def _compose(
    config_name: str, overrides: Sequence[str], directories: Sequence[Path] = (), *, with_hydra: bool = False
) -> DictConfig:
    GlobalHydra.instance().clear()
    everywhere = [conf_dir(), *directories]
    # A root is not looked for on a search path that is an override.
    home = next((path for path in everywhere if (path / f"{config_name}.yaml").is_file()), everywhere[0])
    if directories:
        paths = ",".join(f"'file://{path}'" for path in everywhere if path != home)
        overrides = [*overrides, f"hydra.searchpath=[{paths}]"]
    try:
        with hydra.initialize_config_dir(str(home), version_base="1.3"):
            return hydra.compose(config_name, list(overrides), return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(str(error).strip()) from error


def check_overrides(config_name: str, overrides: Sequence[str], directories: Sequence[Path] = ()) -> None:
    """Raise :class:`ConfigurationError` for an override of a field or a choice of a group option that is not there.

    Args:
        directories: of configurations beside the package's, whose groups and options count too.
    """
    parsed = [_parsed(override) for override in overrides]
    everywhere = [conf_dir(), *directories]
    groups = {path.name for directory in everywhere for path in directory.iterdir() if path.is_dir()}
    choices = [override for override in parsed if override.key_or_group in groups]
    for override in choices:
        _check_choice(override, everywhere)
    plain = [override for override in parsed if not (override.is_add() or override.is_force_add())]
    names = None
    for override in plain:
        if override in choices or override.key_or_group.startswith("hydra"):
            continue
        if names is None:
            names = list(_names(_compose(config_name, _one_of_each(choices), directories)))
        if override.key_or_group not in names:
            raise ConfigurationError(
                f"There is no field {override.key_or_group!r}.{_nearest(override.key_or_group, names)} To add a field "
                f"that Lightning's Trainer takes, write +{override.input_line}"
            )


def _parsed(override: str) -> Override:
    try:
        return OverridesParser.create().parse_overrides([override])[0]
    except HydraException as error:
        name, _, value = override.partition("=")
        raise ConfigurationError(
            f"{override} cannot be read: {str(error).splitlines()[0]}. A value with any of =,[]{{}}: or spaces is "
            f"quoted twice, for the shell and for Hydra: {name}='\"{value}\"'"
        ) from error


def _one_of_each(choices: Sequence[Override]) -> list[str]:
    """The choices of groups, of a sweep's the first of each."""
    lines = []
    for choice in choices:
        line = str(choice.input_line)
        if choice.is_sweep_override():
            name = line.partition("=")[0]
            line = f"{name}={next(iter(choice.sweep_string_iterator()))}"
        lines.append(line)
    return lines


def _check_choice(override: Override, directories: Sequence[Path]) -> None:
    if override.is_sweep_override() or override.is_delete():
        return
    options = sorted({path.stem for home in directories for path in (home / override.key_or_group).glob("*.yaml")})
    if override.value() not in options:
        raise ConfigurationError(
            f"{override.key_or_group}={override.value()} is none of {', '.join(options)}."
            f"{_nearest(str(override.value()), options)}"
        )


def _names(node: Any, prefix: str = "") -> Iterator[str]:
    for key, child in _children(node):
        yield f"{prefix}{key}"
        yield from _names(child, f"{prefix}{key}.")


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of a dict without resolving interpolations, which may need values that are not given yet."""
    if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
        for key in node:
            yield str(key), node._get_node(key)


def _nearest(name: str, names: Sequence[str]) -> str:
    # The last part alone decides when the group is right, since long common prefixes make everything near.
    group, _, last = name.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in names if other.rpartition(".")[0] == group}
    match = difflib.get_close_matches(last, list(siblings), n=1, cutoff=0.5)
    if match:
        return f" Did you mean {siblings[match[0]]!r}?"
    anywhere = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {anywhere[0]!r}?" if anywhere else ""


# ------------------------------------------------------------------------------------------------------------ types


def check(config: DictConfig, own: Collection[str] = ()) -> None:
    """Raise :class:`ConfigurationError` if a node's ``_target_`` is none that a configuration may make, does not take a
    field, or not a value of its type, or a value is missing.

    Args:
        own: targets that the user typed; see :mod:`lightning_megatron.cli.targets`.
    """
    _check_missing(config)
    for path, node in _targets(config):
        target = _locate(_value(node, "_target_", f"{path}._target_"), path, own)
        hints, takes_any = parameters(target)
        for name in node:
            field = f"{path}.{name!s}" if path else str(name)
            if str(name).startswith("_"):
                continue
            if name not in hints and not takes_any:
                near = _nearest(field, [f"{path}.{hint}" if path else hint for hint in hints])
                raise ConfigurationError(f"{node['_target_']} has no field {field!r}.{near}")
            value = _value(node, name, field)
            if name in hints and not fits(value, hints[name]):
                raise ConfigurationError(f"{field}={value!r} is not of the type {spell(hints[name])}.")


def _check_missing(config: DictConfig) -> None:
    for path, node in [("", config), *_targets(config)]:
        for name in map(str, node):
            if OmegaConf.is_missing(node, name):
                field = f"{path}.{name}" if path else name
                raise ConfigurationError(f"{field} has no value. Give it one: {field}=...")


def _value(node: DictConfig, name: Any, field: str) -> Any:
    try:
        return OmegaConf.to_object(node[name]) if OmegaConf.is_config(node[name]) else node[name]
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{field}: {str(error).splitlines()[0]}") from error


def _targets(node: Any, path: str = "") -> list[tuple[str, DictConfig]]:
    try:
        return list(targets.nodes(node, path))
    except RecursionError:
        raise ConfigurationError(f"{path or 'The configuration'} holds an interpolation of itself.") from None


def _locate(name: Any, path: str, own: Collection[str]) -> Any:
    if reason := targets.refusal(name, path, own):
        raise ConfigurationError(reason)
    try:
        return targets.locate(name, own)
    except PermissionError as error:
        raise ConfigurationError(f"{path}._target_={name!r} may not be made by a configuration: {error}.") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{path}._target_={name!r} cannot be imported: {error}") from error
