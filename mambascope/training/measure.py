"""What siblings are compared by, beyond the quality of their text: copying against N, context, the price of a token.

- Copying: loss on the first and second copy of N random tokens (:mod:`mambascope.analyses.capacity`), N = 16 … 1,024.
- In-context score: mean loss near token 500 less that near token 50 (Olsson et al., 2209.11895) on a held-out text.
- Generation: seconds for one greedy token after 100, 1,000 and 10,000 tokens of context, and the bytes of state that
  the model carries there. Flat for a state-space model; attention's keys and values grow with the context.

Each writes its rows into the model's card; :func:`compare` lays the cards of several models side by side.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mambascope.analyses.capacity import copy_capacity
from mambascope.errors import InputError
from mambascope.training.data import HELD_OUT, encode, find_file, read_text
from mambascope.training.export import open_model
from mambascope.training.machine import machine
from mambascope.training.metrics import in_context_score
from mambascope.zoo.card import add_evaluation, read_card

if TYPE_CHECKING:
    import pandas as pd

    from mambascope.model import HookedMamba

__all__ = [
    "COPYING",
    "GENERATION",
    "IN_CONTEXT",
    "compare",
    "evaluate_context",
    "evaluate_copying",
    "evaluate_generation",
]

COPYING, IN_CONTEXT, GENERATION = "Copying of random tokens", "In-context score", "Generation"
_WINDOW = 512  # tokens of a window of the in-context score
_TOKENS = 24  # generated per timing


def evaluate_copying(
    folder: str | Path,
    lengths: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024),
    *,
    rows: int = 32,
    seed: int = 0,
    device: str | None = None,
    write: bool = True,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Loss and accuracy on the second copy of N random tokens against the first copy's loss, into the card.

    ``second_over_first``: the share of the loss that is left where the answer can be recalled, 0 for perfect recall.
    Raises as :func:`mambascope.analyses.capacity.copy_capacity` does.
    """
    model = open_model(folder, device)
    found = copy_capacity(model, tuple(lengths), rows=rows, seed=seed)
    rows_of = [
        {
            "N": n,
            "first_copy_nats": float(found.first_loss[i]),
            "second_copy_nats": float(found.second_loss[i]),
            "second_over_first": float(found.second_loss[i] / found.first_loss[i]),
            "accuracy": float(found.accuracy[i]),
            "accuracy_error": float(found.accuracy_error[i]),
        }
        for i, n in enumerate(found.n)
    ]
    for row in rows_of:
        report(
            f"N = {row['N']:>5,}: {row['first_copy_nats']:.3f} nats, second copy {row['second_copy_nats']:.3f} "
            f"({row['second_over_first']:.1%}), accuracy {row['accuracy']:.3f} ± {row['accuracy_error']:.3f}"
        )
    return _keep(folder, COPYING, "--copying", {"rows_a_length": rows, "seed": seed}, rows_of, model, write)


def evaluate_context(
    folder: str | Path,
    data: Sequence[str | Path],
    *,
    windows: int = 64,
    device: str | None = None,
    write: bool = True,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The in-context score on the first ``windows`` windows of 512 tokens of WikiText-2's validation text, in nats
    (negative: context helps), into the card. Raises LoadError where the text is not below a folder of ``data``."""
    model, text = open_model(folder, device), read_text(find_file(HELD_OUT, [Path(d) for d in data]))
    if model.tokenizer is None:
        raise InputError(f"{folder} has no tokenizer; the in-context score needs one")
    ids = encode(model.tokenizer.backend, text).astype(np.int64)
    count = min(windows, (len(ids) - 1) // _WINDOW)
    if count < 1:
        raise InputError(f"{HELD_OUT} has {len(ids):,} tokens, fewer than one window of {_WINDOW}")
    rows = torch.from_numpy(np.stack([ids[i * _WINDOW : (i + 1) * _WINDOW + 1] for i in range(count)]))
    score = in_context_score(model, rows)
    report(f"in-context score {score:.4f} nats on {count} windows")
    values = {"in_context_score_nats": score, "windows": count}
    return _keep(folder, IN_CONTEXT, "--context --data …", values, None, model, write)


def evaluate_generation(
    folder: str | Path,
    positions: Sequence[int] = (100, 1000, 10_000),
    *,
    repeats: int = 5,
    device: str | None = None,
    write: bool = True,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Milliseconds for a greedy token and bytes of state after that many tokens of context, batch 1, into the card.

    The median of ``repeats`` runs of 24 tokens, the positions in turn so that a noisy machine hits all alike.
    """
    model = open_model(folder, device)
    states = {}
    with torch.no_grad():
        for position in positions:
            x = torch.randint(model.cfg.n_tokens, (1, position), generator=torch.Generator().manual_seed(position))
            x = x.to(model.device)
            states[position] = (x[:, -1:], model(x[:, :-1], return_type=None, return_state=True)[1])
    times: dict[int, list[float]] = {position: [] for position in positions}
    for turn in range(repeats + 1):
        for position, (x, state) in states.items():
            _wait(model)
            start = time.perf_counter()
            model.generate(x, _TOKENS, state=state)
            _wait(model)
            if turn:  # the first is warming up
                times[position].append((time.perf_counter() - start) / _TOKENS)
    rows = [
        {"position": position, "ms_a_token": 1e3 * statistics.median(times[position]), "state_bytes": state.nbytes}
        for position, (_, state) in states.items()
    ]
    for row in rows:
        speed, held = f"{row['ms_a_token']:.3f} ms a token", f"{row['state_bytes']:,} bytes of state"
        report(f"position {row['position']:>7,}: {speed}, {held}")
    return _keep(folder, GENERATION, "--generation", {"tokens_timed": _TOKENS, "runs": repeats}, rows, model, write)


def _wait(model: "HookedMamba") -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _keep(
    folder: str | Path,
    name: str,
    flags: str,
    values: dict[str, Any],
    rows: list[dict[str, Any]] | None,
    model: "HookedMamba",
    write: bool,
) -> dict[str, Any]:
    command = f"python -m mambascope.zoo evaluate {Path(folder).name} {flags}"
    kept = {**values, "command": command, **machine(model.device)}
    if rows is not None:
        kept["rows"] = rows
    if write:
        add_evaluation(Path(folder), name, kept)
    return kept


def compare(folders: Sequence[str | Path]) -> "pd.DataFrame":
    """The cards of several models side by side: a row a measurement, a column a model; empty where a card lacks it.

    Models of one name are told apart by their folders. Nothing is measured here: ``python -m mambascope.zoo evaluate``
    writes cards. Raises LoadError for a missing card and InputError for a folder given twice.
    """
    import pandas as pd

    cards = [(Path(folder), read_card(Path(folder))) for folder in folders]
    called = [card["name"] for _, card in cards]
    columns = {card["name"] if called.count(card["name"]) == 1 else str(f): _column(card) for f, card in cards}
    if len(columns) < len(cards):
        raise InputError(f"the models to compare must differ, got {', '.join(str(f) for f, _ in cards)}")
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    cells = {model: [column.get(n) for n in names] for model, column in columns.items()}
    return pd.DataFrame(cells, index=names, dtype=object)


def _column(card: dict[str, Any]) -> dict[str, Any]:
    training, found = card["training"], card.get("evaluations", {})
    column: dict[str, Any] = {"parameters": card["parameters"], "tokens seen": training.get("tokens_seen")}
    column["training, tokens/s"] = training.get("tokens_per_second")
    for name, values in found.items():
        rows = values.get("rows", [])
        if name == COPYING:
            column |= {f"second copy / first, N = {row['N']:,}": row["second_over_first"] for row in rows}
        elif name == GENERATION:
            for row in rows:
                column[f"ms a token at {row['position']:,}"] = row["ms_a_token"]
                column[f"state bytes at {row['position']:,}"] = row["state_bytes"]
        elif name == IN_CONTEXT:
            column["in-context score, nats"] = values["in_context_score_nats"]
        elif "bits_per_byte" in values:
            column[f"{name}, bits per byte"] = values["bits_per_byte"]
        elif rows and "task" in rows[0]:
            answers = values.get("answers", "")
            column |= {f"{row['task']} (answers {answers})": row["accuracy"] for row in rows if row["accuracy"] != ""}
        elif rows and "errors" in rows[0]:
            for row in rows:
                column[f"{name}, errors at {row['length']:,} of {row['sequences']:,}"] = row["errors"]
    return column
