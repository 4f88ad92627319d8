"""From a training folder to a model folder with its card, and the measurements that go into the card."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mambascope.analyses.tasks import evaluate, load_text_task
from mambascope.analyses.tasks.text import TEXT_TASKS
from mambascope.errors import InputError, LoadError
from mambascope.training.build import build_model
from mambascope.training.checkpoint import latest_checkpoint, load_checkpoint, read_progress
from mambascope.training.data import HELD_OUT, SEPARATOR, find_file, read_text, sha256
from mambascope.training.evaluate import bits_per_byte
from mambascope.training.files import read_json
from mambascope.training.machine import machine
from mambascope.training.recipe import Recipe
from mambascope.zoo.card import add_evaluation, read_card, write_card

__all__ = ["evaluate_task", "evaluate_text", "evaluate_text_tasks", "export_model", "open_model"]

SHARD_BYTES = 16 << 20
"""Largest weight file of an exported model."""

EVALUATION_NAMES = {"induction": "Induction heads"}
"""Headings in a card, where the task's name alone is not one."""


def export_model(out: str | Path, to: str | Path) -> Path:
    """Write the newest checkpoint of a training as a model folder (config, safetensors, tokenizer, card).

    Weights are stored as the recipe's ``store`` says, in files of at most 16 MiB; A_log and D stay float32.
    Raises LoadError where there is no checkpoint, or one whose files are damaged.
    """
    from mambascope.loading import save_model
    from mambascope.loading.tokenizer import Tokenizer

    out, to = Path(out), Path(to)
    newest = latest_checkpoint(out)
    if newest is None:
        raise LoadError(f"{out} holds no checkpoint; train into it first")
    recipe = Recipe.from_dict(read_progress(newest)["recipe"], where=str(newest))
    model = build_model(recipe)
    progress = load_checkpoint(newest, model)
    if recipe.text is not None:
        special = None if recipe.model.bos_token_id is None else SEPARATOR
        model.tokenizer = Tokenizer.from_file(out / "tokenizer.json", bos_token=special, eos_token=special)
    card = _card(recipe, progress, out, model)
    dtype = torch.bfloat16 if recipe.store == "bf16" else torch.float32
    save_model(model, to, dtype=dtype, max_shard_bytes=SHARD_BYTES)
    write_card(to, card)
    return to


def _card(recipe: Recipe, progress: dict[str, Any], out: Path, model: torch.nn.Module) -> dict[str, Any]:
    last, machine = progress["rows"][-1], progress.get("machine", {})
    training = {
        "steps": progress["step"],
        "steps_of_the_recipe": recipe.train.steps,
        "tokens_seen": last["tokens"],
        "seconds": progress["seconds"],
        "tokens_per_second": last["tokens"] / max(progress["seconds"], 1e-9),
        "last_training_loss_in_nats": last["loss"],
        **machine,
    }
    if "floor" in progress:
        floor = progress["floor"]
        training["floor_in_tokens_per_second"] = floor["tokens_per_second"]
        training["share_of_the_floor"] = training["tokens_per_second"] / floor["tokens_per_second"]
    if progress["evaluations"]:
        training["last_held_out_losses_in_nats"] = ", ".join(
            f"{key} {value:.4f}" for key, value in progress["evaluations"][-1].items() if key != "step"
        )
    card = {
        "name": recipe.name,
        "summary": recipe.description,
        "licence": recipe.licence,
        "parameters": sum(p.numel() for p in model.parameters()),
        "stored_as": recipe.store,
        "evaluations": {},
        "training": training,
        "loss_curve": _thin(progress["rows"]),
        "recipe": recipe.to_dict(),
    }
    if recipe.text is not None:
        seen = read_json(out / "epochs.json", ("sources", "epochs"))
        if "overlap" in seen:
            training[f"held_out_windows_of_{seen['overlap']['window']}_tokens_also_trained_on"] = ", ".join(
                f"{name} {share:.2%}" for name, share in seen["overlap"]["shares"].items()
            )
        if repeated := seen.get("repeated_tokens"):
            training["of_these_random_tokens_read_twice"] = repeated
        card["sources"] = [
            {
                "name": source.name,
                "text": source.origin,
                "licence": source.licence,
                "tokens": seen["sources"][source.name]["tokens"],
                "epochs": round(seen["epochs"][source.name], 2),
                "sha256_of_the_file": seen["sources"][source.name]["source_sha256"],
            }
            for source in recipe.text.sources
        ]
    return card


def _thin(rows: list[dict[str, float]], most: int = 100) -> list[list[float]]:
    """The loss curve as at most ``most`` pairs of tokens seen and the mean loss since the pair before."""
    size = -(-len(rows) // most)
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [[group[-1]["tokens"], round(sum(row["loss"] for row in group) / len(group), 5)] for group in groups]


def open_model(folder: str | Path, device: str | None) -> Any:
    """The model of a folder, from its stored weights."""
    from mambascope.loading import load

    return load(Path(folder).resolve(), device=device)


def evaluate_text(
    folder: str | Path,
    data: Sequence[str | Path],
    *,
    device: str | None = None,
    write: bool = True,
    reset_every: int = 4096,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Bits per byte of WikiText-2's validation text under a model folder's stored weights, in float32.

    Twice: with the state carried through the whole text (the number that counts), and with a fresh start every
    ``reset_every`` tokens. A model with attention knows no more than the length it was trained at: instead of both it
    reads windows of that length that overlap by half. Written into the card. Raises LoadError where the text is not
    below a folder of ``data``.
    """
    folder, path = Path(folder), find_file(HELD_OUT, [Path(d) for d in data])
    model, text = open_model(folder, device), read_text(path)
    if model.tokenizer is None:
        raise InputError(f"{folder} has no tokenizer; bits per byte needs one")
    tokenizer, context = model.tokenizer.backend, "state carried through the whole text"
    told = "one stream from the separator, state carried on; every token scored once"
    window = read_card(folder)["recipe"]["train"]["length"] // 2 * 2 if "a" in model.cfg.layers else None
    if window is not None:
        told = context = f"windows of {window} tokens, overlapping by half; every token scored once, in a second half"
    report(f"{HELD_OUT}: {len(text.encode('utf-8')):,} bytes, {context}")
    carried = bits_per_byte(model, tokenizer, text, window=window, report=report)
    fresh: dict[str, float] = {}
    if window is None:
        reset = bits_per_byte(model, tokenizer, text, reset_every=reset_every)
        fresh = {f"bits_per_byte_with_a_fresh_start_every_{reset_every}_tokens": reset.bits_per_byte}
    values = {
        "bits_per_byte": carried.bits_per_byte,
        **fresh,
        "nats_per_token": carried.nats_per_token,
        "perplexity_per_word": carried.word_perplexity,
        "tokens": carried.tokens,
        "utf8_bytes": carried.utf8_bytes,
        "context": told,
        "text_sha256": sha256(path),
        "command": f"python -m mambascope.zoo evaluate {folder.name} --data …",
        **machine(model.device),
    }
    more = "".join(f"  (fresh start every {reset_every}: {value:.4f})" for value in fresh.values())
    report(f"bits per byte {carried.bits_per_byte:.4f}{more}")
    report(f"nats per token {carried.nats_per_token:.4f}  perplexity per word {carried.word_perplexity:.2f}")
    if write:
        add_evaluation(folder, "WikiText-2 validation", values)
    return values


def evaluate_text_tasks(
    folder: str | Path,
    sets: str | Path,
    *,
    names: Sequence[str] | None = None,
    single_tokens: bool = True,
    device: str | None = None,
    write: bool = True,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Accuracy on text tasks (:mod:`mambascope.analyses.tasks.text`) whose evaluation sets are in the folder ``sets``,
    under a model folder's stored weights; into the card, with how many items were given and kept."""
    model = open_model(folder, device)
    rows: list[dict[str, Any]] = []
    for name in TEXT_TASKS if names is None else names:
        task = load_text_task(name, sets, model, single_tokens=single_tokens)
        row = task.score(model).row()
        dropped = "".join(f"; {count:,} dropped: {reason}" for reason, count in task.dropped.items())
        kept = f"{row['kept']:,} of {row['given']:,} kept{dropped}"
        if not row["kept"]:  # nothing was measured: no number, and no NaN, which JSON does not have
            rows.append({key: value if key in ("task", "given", "kept") else "" for key, value in row.items()})
            report(f"{name:<14} {kept}")
            continue
        rows.append(row)
        report(
            f"{name:<14} accuracy {row['accuracy']:.4f} ({row['at least']:.4f} … {row['at most']:.4f}), "
            f"chance {row['chance']:.4f}; {kept}"
        )
    flag = "" if single_tokens else " --long-answers"
    command = f"python -m mambascope.zoo evaluate {Path(folder).name} --text-tasks …{flag}"
    answers = "single tokens" if single_tokens else "of any length"
    values = {"answers": answers, "command": command, **machine(model.device), "rows": rows}
    if write:
        add_evaluation(Path(folder), f"Text tasks, answers {answers}", values)
    return values


def evaluate_task(
    folder: str | Path,
    lengths: Sequence[int],
    counts: Sequence[int],
    *,
    seed: int = 1,
    device: str | None = None,
    write: bool = True,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Errors on fresh rows, at each length, of the task that the model was trained on (``counts``: one number, or one a
    length); into the card, with the lengths beyond the trained one flagged."""
    data = Recipe.from_dict(read_card(Path(folder))["recipe"], where=f"{folder}/card.json")
    if data.task is None:
        raise InputError(f"{folder} was trained on text, not on a task")
    task = data.task.make()
    if len(counts) not in (1, len(lengths)):
        raise InputError(f"--sequences wants one number or {len(lengths)} (one a length), got {len(counts)}")
    model = open_model(folder, device)
    rows: list[dict[str, Any]] = []
    for index, length in enumerate(lengths):
        count = counts[index] if len(counts) > 1 else counts[0]
        result = evaluate(task, model, length, count, seed=seed, trained_length=data.train.length)
        low, _ = result.interval
        row = {
            "length": length,
            "beyond_training": "yes" if result.beyond_training else "no",
            "sequences": count,
            "targets": result.targets,
            "errors": result.errors,
            "accuracy": result.accuracy,
            "accuracy_at_least": low,
            "loss_in_nats": result.loss,
            "best_possible": result.best_loss,
        }
        rows.append(row)
        beyond = ", beyond the trained length" if result.beyond_training else ""
        report(
            f"length {length:>9,}: {result.errors} errors in {result.targets:,}  (accuracy >= {low:.4f} at 95 %, "
            f"loss {result.loss:.2e}, best possible {result.best_loss:.2e}{beyond})"
        )
    command = f"python -m mambascope.zoo evaluate {Path(folder).name} --lengths … --sequences … --seed {seed}"
    values = {"seed": seed, "command": command, **machine(model.device), "rows": rows}
    if write:
        add_evaluation(Path(folder), EVALUATION_NAMES.get(task.name, f"Task {task.name}"), values)
    return values
