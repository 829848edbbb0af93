"""Run configs: YAML plus `key=value` words -> frozen, validated objects; every problem in one message."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from t2i_align.errors import T2IError

T = TypeVar("T", bound="Settings")


class ConfigError(T2IError):
    """A config that cannot be used; the message lists all problems at once."""


class Settings(BaseModel):
    """Base of every config object: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def to_yaml(self) -> str:
        """The resolved config as YAML that `load_config` reads back to an equal object."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class TrainConfig(Settings):
    """Settings of the training loop, `t2i_align.training.fit`."""

    steps: int = Field(gt=0, description="optimiser updates")
    seed: int = Field(0, description="names every random number of the run")
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False, description="peak learning rate of AdamW")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up")
    warmup: int = Field(0, ge=0, description="updates of linear warm-up")
    decay: float = Field(
        1.0, gt=0, le=1, description="share of the run, at its end, over which a cosine schedule falls to zero"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW momenta")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    max_norm: float | None = Field(1.0, gt=0, description="clip the gradient norm here; null for no clipping")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="autocast type of the networks; trained weights, log-probs and losses stay fp32"
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="`adamw_8bit` keeps its moments in 8 bits, by bitsandbytes"
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; null for none")
    elastic_reset: int | None = Field(
        None,
        gt=0,
        description="updates between Elastic Resets (weights to their average, that to the start); null: never",
    )
    elastic_decay: float = Field(0.995, gt=0, lt=1, description="decay of the average of Elastic Resets")
    checkpoint_every: int = Field(200, gt=0, description="updates between checkpoints")
    keep: int = Field(2, gt=0, description="checkpoints kept")
    log_every: int = Field(20, gt=0, description="updates between rows of metrics.jsonl")


def load_config(cls: type[T], source: str | Path | Mapping[str, Any] | None, overrides: Iterable[str] = ()) -> T:
    """Build a config object.

    Args:
        cls: the config class.
        source: path of a YAML file, a mapping, or None for the defaults.
        overrides: words `a.b=value`, values read as YAML; later words win.

    Raises:
        ConfigError: with one line per problem: unknown keys (with the nearest known one), wrong types, missing values.
    """
    data = _over(_default_blocks(cls), read_mapping(source))
    problems: list[str] = []
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            problems.append(f"expected an override such as 'train.steps=50' but got {word!r}")
            continue
        try:
            _assign(data, name.strip().split("."), parse_yaml(value), problems)
        except yaml.YAMLError as error:
            problems.append(f"{name.strip()}: {value!r} is not valid YAML ({' '.join(str(error).split())})")
    try:
        made = cls.model_validate(data)
    except ValidationError as error:
        problems += [_explain(cls, dict(problem)) for problem in error.errors()]
    if problems:
        origin = f" in {source}" if isinstance(source, (str, Path)) else ""
        raise ConfigError(f"The config{origin} has {_count(problems)}: " + "; ".join(problems) + ".")
    return made


def find_class(name: str, table: Mapping[str, str], what: str, base: str, error: type[T2IError] = T2IError) -> Any:
    """The class behind a name of a table, or behind `package.module:Class`.

    Args:
        name: a key of `table` (a hyphen is as good as an underscore), or a class of one's own.
        table: names -> `package.module:Class`.
        what: kind of thing, for messages: `scorer`.
        base: `package.module:Class` that it must be a subclass of; imported once the name is known.
        error: raised for what is no such class.

    Raises:
        T2IError: (as `error`) no such name, with the nearest one and the list; or not a class of that kind.
    """
    known = name.lower().replace("-", "_")
    target = name if ":" in name else table.get(known)
    if target is None:
        raise error(f"Unknown {what} {name!r}.{nearest(known, table)} Available: {', '.join(table)}.")
    try:
        found = _import(target)
    except (ImportError, AttributeError, ValueError) as problem:
        raise error(f"Cannot import the {what} {target!r}: {problem}.") from problem
    if not (isinstance(found, type) and issubclass(found, _import(base))):
        raise error(f"Expected {target!r} to be a subclass of {base.replace(':', '.')} but got {found!r}.")
    return found


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def parse_yaml(text: str) -> Any:
    """Read YAML, taking `1e-4` for a number, as YAML 1.2 does and PyYAML does not."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` where something known is close to `name`, else the empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def read_mapping(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """The content of a YAML file, or a copy of a mapping. Raises ConfigError where it is none."""
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return {name: _copy(value) for name, value in source.items()}
    path = Path(source)
    if (path / "config.yaml").is_file():
        raise ConfigError(f"Expected a config but {path} is the folder of a run: use {path / 'config.yaml'}.")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the config {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The config {path} is not UTF-8 text: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"Expected the config {path} to be a mapping of names to values but got {data!r:.60}.")
    return data


def _default_blocks(cls: type[Settings]) -> dict[str, Any]:
    """The blocks a config class fills in itself, so that changing one key of a block keeps the others."""
    blocks = {name: field.default for name, field in cls.model_fields.items() if isinstance(field.default, Settings)}
    return {name: block.model_dump() for name, block in blocks.items()}


def _over(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `data`, block by block."""
    for name, value in changes.items():
        inner = data.get(name)
        data[name] = _over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return data


def _copy(value: Any) -> Any:
    return {name: _copy(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _assign(data: dict[str, Any], path: Sequence[str], value: Any, problems: list[str]) -> None:
    for depth, part in enumerate(path[:-1]):
        inner = data[part] = {} if data.get(part) is None else data[part]
        if not isinstance(inner, dict):
            problems.append(f"{'.'.join(path)}: {'.'.join(path[: depth + 1])} is a value, not a block")
            return
        data = inner
    data[path[-1]] = value


def _explain(cls: type[Settings], problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = list(_block(cls, path[:-1]))
        return f"unknown key {name!r}.{nearest(path[-1], known)} Known: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{name} is required"
    if problem["type"] == "value_error":  # a sentence of ours
        text = str(problem["ctx"]["error"]).rstrip(".")
        return f"{name}: {text}" if name else text
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{name}: {message}, but got {problem['input']!r}" if name else message


def _block(cls: type[Settings], path: Sequence[str]) -> Iterable[str]:
    """Field names of the (nested) config class at `path`."""
    for part in path:
        field = cls.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, Settings)):
            return ()
        cls = inner
    return cls.model_fields


def _count(problems: list[str]) -> str:
    return "a problem" if len(problems) == 1 else f"{len(problems)} problems"
