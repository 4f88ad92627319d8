"""From a recipe to its parts: tokenizer and token files, model, batches, evaluation; and the whole training."""

import json
import shutil
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mambascope.analyses.tasks import evaluate as evaluate_task
from mambascope.errors import InputError, LoadError
from mambascope.loading import usable_device
from mambascope.storage import sweep_out, write_bytes
from mambascope.training.data import (
    HELD_OUT,
    TokenFile,
    encode,
    find_file,
    read_documents,
    read_text,
    sha256,
    train_tokenizer,
    write_tokens,
)
from mambascope.training.evaluate import held_out_losses
from mambascope.training.files import only_writer, read_json
from mambascope.training.floor import measure_floor
from mambascope.training.loop import TrainResult, check_folder, finish, training
from mambascope.training.metrics import inside_metrics, largest_fall, state_metrics
from mambascope.training.overlap import WINDOW, shared_windows
from mambascope.training.recipe import Recipe, TextData
from mambascope.training.sampler import Batches, Repeats, TextStream, WindowSampler
from mambascope.training.task_batches import TaskBatches, last_only

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mambascope.model import HookedMamba

__all__ = ["PreparedText", "build_model", "prepare_text", "recipe_training", "train_recipe"]

_MARK, _OVERLAP = "prepared.json", "overlap.json"
_HELD_OUT_WINDOWS = 64


@dataclass(frozen=True)
class PreparedText:
    """A folder with ``tokenizer.json``, one token file a source, and ``prepared.json``, which says from what."""

    folder: Path
    files: dict[str, TokenFile]

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"


def _origin(text: TextData) -> dict[str, Any]:
    """What prepared files depend on: not the shares."""
    keys = ("name", "file", "documents", "tokenizer_characters")
    sources = [{key: getattr(source, key) for key in keys} for source in text.sources]
    return json.loads(json.dumps({"vocabulary": text.vocabulary, "sources": sources}))


def prepare_text(
    text: TextData, folders: Sequence[Path], out: Path, report: Callable[[str], None] = print
) -> PreparedText:
    """Learn the tokenizer and encode every source into ``out``, or reuse what was prepared before.

    A folder among ``folders`` that itself holds prepared data of the same sources is used as it is, so that data can
    be prepared on one machine and trained on another. Raises LoadError for a missing file and InputError where
    ``out`` holds data prepared from other sources.
    """
    for folder in [*folders, out]:
        mark = Path(folder) / _MARK
        if mark.is_file():
            if read_json(mark) != _origin(text):
                raise InputError(
                    f"{folder} holds data prepared from other sources or another vocabulary; "
                    "delete it or give another folder"
                )
            return _open(Path(folder), text)
    paths = {source.name: find_file(source.file, folders) for source in text.sources}
    out.mkdir(parents=True, exist_ok=True)
    sweep_out(out)
    documents = {source.name: read_documents(paths[source.name], source.documents) for source in text.sources}
    sample: list[str] = []
    for source in text.sources:
        left = source.tokenizer_characters or sum(map(len, documents[source.name]))
        for document in documents[source.name]:
            sample.append(document[:left])
            left -= len(sample[-1])
            if left <= 0:
                break
    report(f"learning a byte-level BPE of {text.vocabulary:,} entries from {sum(map(len, sample)):,} characters")
    tokenizer = train_tokenizer(sample, text.vocabulary)
    write_bytes(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode("utf-8"))
    for source in text.sources:
        file = write_tokens(out / f"{source.name}.u16", tokenizer, documents[source.name], sha256(paths[source.name]))
        header = file.header
        report(f"{source.name}: {header.tokens:,} tokens, {header.utf8_bytes / header.tokens:.3f} bytes a token")
    prepared = _open(out, text)
    overlap = _overlap(prepared, text, folders, tokenizer)
    for name, share in overlap.items():
        report(f"{name}: {share:.2%} of its held-out windows of {WINDOW} tokens also stand in training text")
    record = {"held_out": text.held_out, "window": WINDOW, "shares": overlap}
    write_bytes(out / _OVERLAP, json.dumps(record, indent=1).encode("utf-8"))
    write_bytes(out / _MARK, json.dumps(_origin(text), indent=1).encode("utf-8"))
    return prepared


def _split(ids: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """The part that is trained on, and the last part, which never is."""
    cut = len(ids) - int(len(ids) * held_out)
    return ids[:cut], ids[cut:]


def _overlap(
    prepared: PreparedText, text: TextData, folders: Sequence[Path], tokenizer: "Tokenizer"
) -> dict[str, float]:
    """Share of shared windows of each source's held-out part, and of the validation text where a folder has it."""
    parts = {name: _split(file.ids, text.held_out) for name, file in prepared.files.items()}
    held = {name: rest for name, (_, rest) in parts.items() if len(rest)}
    for path in (Path(folder) / HELD_OUT for folder in folders):
        if path.is_file():
            held[HELD_OUT] = encode(tokenizer, read_text(path))
            break
    return {name: shared_windows(ids, [trained for trained, _ in parts.values()]) for name, ids in held.items()}


def _open(folder: Path, text: TextData) -> PreparedText:
    files = {source.name: TokenFile(folder / f"{source.name}.u16") for source in text.sources}
    digests = {file.header.tokenizer_sha256 for file in files.values()}
    if len(digests) != 1:
        raise LoadError(
            f"{folder} mixes token files of {len(digests)} tokenizers; delete it and prepare the data again"
        )
    if not (folder / "tokenizer.json").is_file():
        raise LoadError(f"{folder} has no tokenizer.json; delete it and prepare the data again")
    return PreparedText(folder, files)


def build_model(recipe: Recipe, device: str | torch.device = "cpu") -> "HookedMamba":
    """A fresh model of the recipe's shape; the same seed gives the same weights on every device."""
    from mambascope.model import HookedMamba

    torch.manual_seed(recipe.seed)
    return HookedMamba(recipe.model).to(device)


def train_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    data: Sequence[str | Path] = (),
    device: str | torch.device = "cpu",
    resume: bool = False,
    minutes: float | None = None,
    floor: bool | None = None,
    report: Callable[[str], None] = print,
    progress: Callable[[int], None] | None = None,
) -> tuple["HookedMamba", TrainResult]:
    """Train a recipe into ``out`` (see :func:`mambascope.training.loop.train`); ``data``: folders with its text files.

    A text recipe leaves its tokenizer as ``out/tokenizer.json`` and the epochs of each source in ``out/epochs.json``.
    ``floor``: measure first how fast a step could be (None: on a GPU).
    """
    return finish(
        recipe_training(
            recipe, out, data=data, device=device, resume=resume, minutes=minutes, floor=floor, report=report,
            progress=progress,
        )
    )  # fmt: skip


def recipe_training(
    recipe: Recipe,
    out: str | Path,
    *,
    data: Sequence[str | Path] = (),
    device: str | torch.device = "cpu",
    resume: bool = False,
    minutes: float | None = None,
    floor: bool | None = None,
    report: Callable[[str], None] = print,
    progress: Callable[[int], None] | None = None,
) -> Generator[None, None, tuple["HookedMamba", TrainResult]]:
    """:func:`train_recipe`, pausing after each step (see :func:`mambascope.training.loop.training`)."""
    out, device = Path(out), usable_device(device)
    with only_writer(out):  # what a refused training would have written is part of that folder's record
        check_folder(out, recipe.to_dict(), resume)
        batches, evaluate = _text(recipe, out, data, report) if recipe.text is not None else _task(recipe)
        model = build_model(recipe, device)
        settings, on_gpu = recipe.train, model.device.type == "cuda"
        scored = batches(0).targets.shape[1]
        dtype = torch.bfloat16 if on_gpu and settings.precision == "bf16" else torch.float32
        result = yield from training(
            model,
            batches,
            settings,
            out,
            recipe=recipe.to_dict(),
            resume=resume,
            minutes=minutes,
            evaluate=evaluate,
            floor=(lambda: measure_floor(model, settings.batch, settings.length, scored=scored, dtype=dtype))
            if (on_gpu if floor is None else floor)
            else None,
            report=report,
            progress=progress,
            locked=True,
        )
    for key in ("induction_second", *(f"loss_{n}" for n in (recipe.task.evaluate_lengths if recipe.task else ()))):
        fall = largest_fall(result.evaluations, key)
        if result.finished and fall is not None:
            report(str(fall))
    return model, result


def _text(
    recipe: Recipe, out: Path, data: Sequence[str | Path], report: Callable[[str], None]
) -> tuple[Batches, Callable[[nn.Module], dict[str, float]]]:
    text, settings = recipe.text, recipe.train
    assert text is not None
    prepared = prepare_text(text, [Path(folder) for folder in data], out / "data", report)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(prepared.tokenizer_path, out / "tokenizer.json")
    streams, held = [], {}
    for source in text.sources:
        trained, rest = _split(prepared.files[source.name].ids, text.held_out)
        streams.append(TextStream(source.name, trained, source.share))
        if len(rest):
            held[source.name] = rest
    cfg = recipe.model
    special = [i for i in (cfg.bos_token_id, cfg.eos_token_id) if i is not None]
    ordinary = np.setdiff1d(np.arange(cfg.n_tokens), special)
    sampler = WindowSampler(
        streams,
        batch=settings.batch,
        length=settings.length,
        steps=settings.steps,
        seed=recipe.seed,
        hold=text.hold,
        repeats=Repeats(text.repeats, ordinary, text.repeats_longest) if text.repeats else None,
    )
    headers = {name: asdict(file.header) for name, file in prepared.files.items()}
    record = {
        "epochs": sampler.epochs(),
        "sources": headers,
        "trained_tokens": settings.steps * settings.batch * settings.length,
        "repeated_tokens": sampler.repeated(),
    }
    if (prepared.folder / _OVERLAP).is_file():
        overlap = read_json(prepared.folder / _OVERLAP, ("held_out", "window", "shares"))
        if overlap["held_out"] == text.held_out:
            record["overlap"] = overlap
            shares = ", ".join(f"{name} {share:.2%}" for name, share in overlap["shares"].items())
            report(f"held-out windows of {overlap['window']} tokens that are also trained on: {shares}")
    write_bytes(out / "epochs.json", json.dumps(record, indent=1).encode("utf-8"))
    report("epochs: " + ", ".join(f"{name} {count:.2f}" for name, count in sampler.epochs().items()))
    losses = held_out_losses(held, length=settings.length, windows=_HELD_OUT_WINDOWS, batch=settings.batch)
    inside = inside_metrics(held)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return losses(model) | inside(model)

    return (last_only(sampler) if settings.loss == "last" else sampler), evaluate


def _task(recipe: Recipe) -> tuple[Batches, Callable[[nn.Module], dict[str, float]]]:
    data, settings = recipe.task, recipe.train
    assert data is not None
    task = data.make()

    def evaluate(model: nn.Module) -> dict[str, float]:
        values: dict[str, float] = {}
        for length in data.evaluate_lengths or (settings.length,):
            # seed: fresh every time would hide progress; fixed, and apart from training's
            score = evaluate_task(task, model, length, data.evaluate_sequences, seed=recipe.seed + 1_000_003)
            values |= {
                f"errors_{length}": float(score.errors),
                f"accuracy_{length}": score.accuracy,
                f"loss_{length}": score.loss,
                f"best_loss_{length}": score.best_loss,
            }
        probe = task.sample((recipe.seed, 2), 8, settings.length)
        return values | state_metrics(model, probe.tokens)

    return TaskBatches(task, settings, recipe.seed), evaluate
