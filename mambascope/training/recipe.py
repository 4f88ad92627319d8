"""One TOML file a model: shape, data or task, and how it is trained. Unknown keys are named, with the nearest known."""

import copy
import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mambascope.config import MambaConfig
from mambascope.errors import ConfigError, InputError, LoadError, UnknownNameError, nearest

if TYPE_CHECKING:
    from mambascope.analyses.tasks import Task

__all__ = [
    "SHORTEST_BLOCK",
    "Recipe",
    "Source",
    "TaskData",
    "TextData",
    "TrainSettings",
    "check_shares",
    "check_vocabulary",
    "load_recipe",
    "read_recipe",
    "read_values",
    "same_recipe",
    "with_base",
    "with_changes",
]

_T = TypeVar("_T")

SHORTEST_BLOCK = 8
"""Tokens of the shortest block of random tokens that is read twice."""


@dataclass(frozen=True)
class Source:
    """One text file: its name below a data folder, its share of the rows (a number, or start and end of training),
    which of its documents, and where it comes from."""

    name: str
    file: str
    share: tuple[float, float]
    licence: str
    origin: str
    documents: tuple[int, int | None] = (0, None)
    tokenizer_characters: int = 0  # how much of it the tokenizer learns from; 0: all


@dataclass(frozen=True)
class TextData:
    """Text sources; the last ``held_out`` part of each is never trained on. ``hold``: the part of
    training in which shares stay at their start values. ``repeats``: the share of rows that are random tokens read
    twice (:class:`mambascope.training.sampler.Repeats`); the sources share the rest. ``repeats_longest``: the longest
    block of these at the start and the end of training; half a row if not given."""

    sources: tuple[Source, ...]
    vocabulary: int = 8192
    held_out: float = 0.01
    hold: float = 0.0
    repeats: float = 0.0
    repeats_longest: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 0.5:
            raise ConfigError(f"text.held_out must be in 0 … 0.5, got {self.held_out}")
        if not 0 <= self.hold <= 1:
            raise ConfigError(f"text.hold is a part of training, 0 ≤ hold ≤ 1, got {self.hold}")
        if not 0 <= self.repeats < 1:
            raise ConfigError(f"text.repeats is a share of the rows, 0 ≤ repeats < 1, got {self.repeats}")
        if self.repeats_longest is not None and not self.repeats:
            raise ConfigError("text.repeats_longest is given, but text.repeats is 0: no row is read twice")
        if self.repeats_longest is not None and min(self.repeats_longest) < SHORTEST_BLOCK:
            raise ConfigError(f"text.repeats_longest must be at least {SHORTEST_BLOCK}, got {self.repeats_longest}")
        check_vocabulary(self.vocabulary)
        names = [source.name for source in self.sources]
        for name in names:
            if not re.fullmatch(r"[\w. -]*\w[\w. -]*", name):
                raise ConfigError(f"text.sources: {name!r} is to be the name of a file, without a folder")
            if names.count(name) > 1:
                raise ConfigError(f"text.sources: two sources are called {name!r}; each has a token file of its name")
        check_shares([source.share for source in self.sources])


def check_shares(shares: Sequence[tuple[float, float]]) -> None:
    """ConfigError unless the sources' shares, at the start and at the end of training, are two distributions."""
    sums = [sum(share[i] for share in shares) for i in range(2)]
    if not all(part >= 0 for share in shares for part in share) or not all(abs(total - 1) <= 1e-6 for total in sums):
        raise ConfigError(f"the shares of the sources must be >= 0 and add up to 1, got sums {sums}")


def check_vocabulary(vocabulary: int) -> None:
    """ConfigError unless a vocabulary holds the separator and the bytes, and its ids fit 16 bits."""
    if not 257 <= vocabulary <= 65536:
        raise ConfigError(f"vocabulary must be 257 to 65,536 (separator and bytes, 16-bit ids), got {vocabulary}")


@dataclass(frozen=True)
class TaskData:
    """A generated task: its name in ``mambascope.analyses.tasks``, its ``options`` (fields of that task; the rest keeps
    its defaults), and the lengths that evaluation looks at, on ``evaluate_sequences`` rows each."""

    name: str
    evaluate_lengths: tuple[int, ...] = ()  # none: the length trained on
    evaluate_sequences: int = 200
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make(self) -> "Task":
        """The task; UnknownNameError for the name, ConfigError for an option that it does not have."""
        from mambascope.analyses.tasks import task_type

        return _build(task_type(self.name), self.options, f"task {self.name!r}, [task.options]")


@dataclass(frozen=True)
class TrainSettings:
    """How to train. ``batch`` rows of ``length`` tokens for ``steps`` steps; ``lr`` is the peak of a linear warmup
    (``warmup`` steps) followed by a constant or by half a cosine down to ``lr_floor * lr``. ``clip`` bounds the
    gradient's norm (0: none). ``precision`` "bf16" is autocast on CUDA; a CPU trains in float32 either way.
    ``cuda_graph`` records the step once on a GPU, for models whose kernels are shorter than their launches.
    ``loss`` is taken over what the data asks for ("asked": every token of a text, a task's answers), over every next
    token as well ("all"), or over the last position alone ("last")."""

    steps: int
    batch: int
    length: int
    lr: float
    optimizer: Literal["adam", "adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: int = 0
    lr_floor: float = 0.0
    clip: float = 1.0
    loss: Literal["asked", "all", "last"] = "asked"
    precision: Literal["fp32", "bf16"] = "fp32"
    cuda_graph: bool = False
    log_every: int = 20
    checkpoint_every: int = 500
    evaluate_every: int = 500

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "length", "log_every", "checkpoint_every", "evaluate_every"):
            if getattr(self, field) < 1:
                raise ConfigError(f"train.{field} must be at least 1, got {getattr(self, field)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.betas must be two numbers of 0 ≤ beta < 1, got {list(self.betas)}")
        for field in ("lr", "eps", "weight_decay", "lr_floor", "clip", "warmup"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ConfigError(f"train.{field} must be a number >= 0, got {getattr(self, field)}")
        if self.warmup >= self.steps:
            raise ConfigError(f"train.warmup = {self.warmup} leaves nothing of train.steps = {self.steps}")
        if self.schedule == "constant" and self.lr_floor:
            raise ConfigError("train.lr_floor belongs to schedule = 'cosine'; this recipe says 'constant'")
        for field in ("checkpoint_every", "evaluate_every"):
            if getattr(self, field) % self.log_every:
                raise ConfigError(
                    f"train.{field} = {getattr(self, field)} must be a multiple of log_every = {self.log_every}"
                )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a model's weights, apart from device and library versions."""

    name: str
    description: str
    licence: str
    seed: int
    model: MambaConfig
    train: TrainSettings
    text: TextData | None = None
    task: TaskData | None = None
    store: Literal["fp32", "bf16"] = "fp32"  # dtype of the shipped weights

    def __post_init__(self) -> None:
        if (self.text is None) == (self.task is None):
            raise ConfigError(f"recipe {self.name!r} must have exactly one of [text] and [task]")
        if self.seed < 0:
            raise ConfigError(f"recipe {self.name!r}: seed must be at least 0, got {self.seed}")
        if self.text is not None and self.text.vocabulary != self.model.d_vocab:
            raise ConfigError(f"text.vocabulary = {self.text.vocabulary} but model.d_vocab = {self.model.d_vocab}")
        if self.task is not None:
            self._check_task(self.task)

    def _check_task(self, data: TaskData) -> None:
        if data.evaluate_sequences < 1:
            raise ConfigError(f"task.evaluate_sequences must be at least 1, got {data.evaluate_sequences}")
        try:
            task = data.make()
            for length in (self.train.length, *data.evaluate_lengths):
                task.check(length)
            task.fits(self.model.n_tokens)
            if self.train.loss == "last" and not task.sample(0, 64, self.train.length).mask[:, -1].all():
                raise InputError("train.loss = 'last', but not every row asks for its last position")
        except (InputError, UnknownNameError) as error:
            raise ConfigError(f"recipe {self.name!r}, [task]: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self) | {"model": self.model.to_dict()}))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> "Recipe":
        """Build and check a recipe; ConfigError names the section and the key."""
        values = dict(values)
        known = {field.name for field in dataclasses.fields(cls)}
        _refuse_unknown(values, known, where)
        try:
            values["model"] = MambaConfig.from_dict({"name": values.get("name", "mamba"), **values.get("model", {})})
        except ConfigError as error:
            raise ConfigError(f"{where}, [model]: {error}") from None
        values["train"] = _build(TrainSettings, values.get("train", {}), f"{where}, [train]")
        if values.get("text") is not None:
            text = dict(values["text"])
            sources = [dict(source) for source in text.get("sources", ())]
            for source in sources:
                if isinstance(source.get("share"), (int, float)):
                    source["share"] = (source["share"], source["share"])
                if isinstance(source.get("documents"), list) and len(source["documents"]) == 1:
                    source["documents"] = (source["documents"][0], None)
            text["sources"] = tuple(
                _build(Source, source, f"{where}, [[text.sources]] {source.get('name', '?')!r}") for source in sources
            )
            values["text"] = _build(TextData, text, f"{where}, [text]")
        if values.get("task") is not None:
            values["task"] = _build(TaskData, values["task"], f"{where}, [task]")
        return _build(cls, values, where)


def load_recipe(path: str | Path) -> Recipe:
    """Read a TOML recipe. Raises LoadError (missing, no TOML) or ConfigError (wrong keys or values)."""
    return Recipe.from_dict(read_recipe(path), where=str(path))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The tables of a recipe. ``like = "name"`` takes over what a recipe beside it says, but for what stands here:
    siblings share their data and their training by construction."""
    path = Path(path)
    return with_base(read_values(path, "recipe"), path.parent, (path.stem,))


def with_base(values: dict[str, Any], folder: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's tables with those of the recipe in ``folder`` that its ``like`` names, if it has that key, beneath.

    ``seen``: recipes of that folder that lead here, none of which it may name again.
    """
    values = dict(values)
    if "like" not in values:
        return values
    like = values.pop("like")
    if not isinstance(like, str) or Path(like).name != like:
        raise ConfigError(f"like must be the name of a recipe in {folder}, without .toml, got {like!r}")
    if like in seen:
        raise ConfigError(f"recipes in {folder} are like each other in a circle: {' -> '.join((*seen, like))}")
    base = with_base(read_values(folder / f"{like}.toml", "recipe"), folder, (*seen, like))
    return _over(base, values)


def _over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``base`` with what ``values`` say, table by table."""
    both = dict(base)
    for key, value in values.items():
        old = base.get(key)
        both[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def read_values(path: str | Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises LoadError where it is missing or no TOML."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise LoadError(f"cannot read {what} {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} is not a TOML file: {error}") from None


def with_changes(values: dict[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A recipe's tables with dotted keys (``train.steps``) set anew; what follows from them is derived afresh."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *sections, last = key.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{where}: {key!r} cannot be set, {section!r} is no table")
        table[last] = value
    return values


_FREE = {
    "train.cuda_graph",
    "train.log_every",
    "train.checkpoint_every",
    "train.evaluate_every",
    "description",
    "licence",
    "store",
}
"""Keys that a resumed run may change: no weight depends on them."""


def same_recipe(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise InputError with every differing key, if two recipes (as dictionaries) would train different weights."""
    a, b = _flat(old), _flat(new)
    differ = [
        f"{key}: {a.get(key, 'absent')} before, {b.get(key, 'absent')} now"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key not in _FREE
    ]
    if differ:
        raise InputError("this folder was trained with another recipe; " + "; ".join(differ) + ". Give another --out")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}


def _refuse_unknown(values: dict[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, known)}; known: {', '.join(sorted(known))}")


def _build(kind: type[_T], values: Any, where: str) -> _T:
    """``kind(**values)`` with unknown, missing and wrongly typed keys named."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a table, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    _refuse_unknown(values, set(fields), where)
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return kind(**{name: _value(fields[name].type, value, f"{where}: {name}") for name, value in values.items()})


def _value(annotation: Any, value: Any, where: str) -> Any:
    """Check a TOML value against a field's annotation; lists become tuples, whole numbers floats."""
    from types import NoneType, UnionType
    from typing import Union, get_args, get_origin

    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return _value(next(kind for kind in inner if kind is not NoneType), value, where)
    if origin is Literal:
        if value not in inner:
            raise ConfigError(f"{where} must be one of {', '.join(map(repr, inner))}, got {value!r}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table, got {value!r}")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) != len(value):
            raise ConfigError(f"{where} must have {len(kinds)} entries, got {value!r}")
        return tuple(_value(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise ConfigError(f"{where} must be {annotation.__name__}, got {value!r}")
    return value
