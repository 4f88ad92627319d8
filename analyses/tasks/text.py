"""Text tasks: does a language model prefer the right next token? Evaluation sets are read from a folder you name.

=============== ============================== ===================================================== ==============
task            file in the folder             right against wrong                                    chance
=============== ============================== ===================================================== ==============
ioi             ioi_pairs.csv                  the indirect object's name against the subject's       0.5
greater_than    greater_than.csv               years after the first against years up to it           by the labels
sva_simple,     sva_simple.json,               the verb form that agrees against the other            0.5
sva_nounpp,     sva_nounpp.json,
sva_within_rc   sva_within_rc.json
known_facts     known_1000.json                the fact's attribute against every other token         1 / V
lambada         lambada_test.jsonl(.xz)        the passage's last word against every other token      1 / V
=============== ============================== ===================================================== ==============

Sources: Wang et al. (2211.00593); Hanna et al. (2305.00586), whose measure is the difference of the summed
probabilities; Finlayson et al. (2106.06087) and Lazo et al. for agreement; Meng et al. (2202.05262); Paperno et al.
(1606.06031).

An item is kept where its answers are single tokens of the model's tokenizer, and where the prompt's tokens stay what
they are when the answer follows. How many were given, kept, and dropped for which reason is part of the result: a small
vocabulary keeps few, so compare models with the same tokenizer. With ``single_tokens=False`` longer answers are kept
too; the probability of one is the product of its tokens', and against "every other" all its tokens must be likeliest.
"""

import csv
import io
import json
import lzma
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mambascope.analyses.tasks.task import wilson
from mambascope.errors import InputError, LoadError, UnknownNameError, nearest

if TYPE_CHECKING:
    from mambascope.model import HookedMamba

__all__ = ["TEXT_TASKS", "TextItem", "TextScore", "TextTask", "load_text_task"]


Ids = tuple[int, ...]


@dataclass(frozen=True)
class TextItem:
    """Token ids: a prompt, the right continuations, and the wrong ones (None: every other)."""

    prompt: Ids
    right: tuple[Ids, ...]
    wrong: tuple[Ids, ...] | None


@dataclass(frozen=True)
class TextScore:
    """``accuracy``: share of items whose right tokens together are likelier than the wrong ones together, or, where
    every other token is wrong, whose right token is the likeliest. ``difference``: mean log-odds of right against
    wrong, in nats. ``probability``: mean of p(right) - p(wrong), or of p(right). ``chance``: accuracy by guessing."""

    name: str
    items: int
    right: int
    difference: float
    probability: float
    chance: float
    given: int
    dropped: dict[str, int]

    @property
    def accuracy(self) -> float:
        return self.right / self.items if self.items else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson(self.right, self.items) if self.items else (0.0, 1.0)

    def row(self) -> dict[str, Any]:
        """For a table or a card."""
        low, high = self.interval
        return {
            "task": self.name, "given": self.given, "kept": self.items, "accuracy": self.accuracy, "at least": low,
            "at most": high, "chance": self.chance, "difference in nats": self.difference,
            "probability": self.probability,
        }  # fmt: skip


@dataclass(frozen=True)
class TextTask:
    """The items of one text task that a model's tokenizer can express; ``given`` of the file, ``dropped`` by reason."""

    name: str
    items: tuple[TextItem, ...]
    given: int
    dropped: dict[str, int]

    @torch.no_grad()
    def score(self, model: "HookedMamba", *, tokens_at_once: int = 1 << 13) -> TextScore:
        """Run every prompt; rows of one length go together, so that no padding is needed."""
        found = _continuations(model, self.items, tokens_at_once)
        right, odds, gaps, chances = 0, 0.0, 0.0, 0.0
        for index, item in enumerate(self.items):
            yes = float(torch.tensor([found[index, ids][0] for ids in item.right], dtype=torch.float64).logsumexp(0))
            if item.wrong is None:
                no = math.log1p(-min(math.exp(yes), 1 - 1e-15))
                right += any(found[index, ids][1] for ids in item.right)
                chances += len(item.right) / model.cfg.n_tokens
                gaps += math.exp(yes)
            else:
                no = float(torch.tensor([found[index, ids][0] for ids in item.wrong], dtype=torch.float64).logsumexp(0))
                right += yes > no
                chances += len(item.right) / (len(item.right) + len(item.wrong))
                gaps += math.exp(yes) - math.exp(no)
            odds += yes - no
        n = len(self.items) or math.nan
        return TextScore(
            self.name, len(self.items), right, odds / n, gaps / n, chances / n, self.given, dict(self.dropped)
        )


def _continuations(
    model: "HookedMamba", items: tuple[TextItem, ...], tokens_at_once: int
) -> dict[tuple[int, Ids], tuple[float, bool]]:
    """(item, answer) -> log p(answer | prompt), and whether each of its tokens was the likeliest.

    Answers that differ in their last token only share a row, which is the prompt and all but that token.
    """
    rows: dict[tuple[int, int], dict[tuple[int, Ids], list[Ids]]] = {}
    for index, item in enumerate(items):
        for answer in (*item.right, *(item.wrong or ())):
            begin = answer[:-1]
            group = rows.setdefault((len(item.prompt) + len(begin), len(begin)), {})
            group.setdefault((index, begin), []).append(answer)
    found: dict[tuple[int, Ids], tuple[float, bool]] = {}
    for (length, extra), group in sorted(rows.items()):
        wanted, size = list(group.items()), max(1, tokens_at_once // length)
        for start in range(0, len(wanted), size):
            part = wanted[start : start + size]
            tokens = torch.tensor([(*items[index].prompt, *begin) for (index, begin), _ in part], device=model.device)
            logits = model(tokens, return_type="logits", logits_to_keep=extra + 1)[..., : model.cfg.n_tokens]
            logp = torch.log_softmax(logits.double(), -1).cpu()  # rows extra+1 V
            best = logp.argmax(-1)
            for ((index, _), answers), row, top in zip(part, logp, best, strict=True):
                for answer in answers:
                    ids = torch.tensor(answer)
                    total = row.gather(1, ids[:, None]).sum()
                    found[index, answer] = float(total), bool((top == ids).all())
    return found


def load_text_task(
    name: str,
    folder: str | Path,
    model: "HookedMamba",
    *,
    single_tokens: bool = True,
    prepend_bos: bool | None = None,
) -> TextTask:
    """Read a text task from ``folder`` and keep the items that the model's tokenizer can express.

    ``single_tokens``: keep only items whose answers are single tokens. ``prepend_bos``: None is as the model was
    trained. Raises UnknownNameError for a task that is not in the module's table, LoadError for a file that is missing
    or not of its form, InputError for a model without a tokenizer.
    """
    if name not in TEXT_TASKS:
        raise UnknownNameError(
            f"there is no text task {name!r}{nearest(name, TEXT_TASKS) or '.'} Known: {', '.join(TEXT_TASKS)}"
        )
    if model.tokenizer is None:
        raise InputError(f"text task {name!r} needs a tokenizer; model {model.cfg.name!r} has none")
    file, read = TEXT_TASKS[name]
    path = _find(name, Path(folder), file)
    try:
        raw = list(read(_text(path)))
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise LoadError(f"{path} is not in the form of text task {name!r}: {type(error).__name__} {error}") from None
    if not raw:
        raise LoadError(f"{path} holds no item of text task {name!r}")
    items: list[TextItem] = []
    dropped: Counter[str] = Counter()
    for prompt, right, wrong in raw:
        found = _encode(model, prompt, right, wrong, single_tokens, prepend_bos)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            items.append(found)
    return TextTask(name, tuple(items), len(raw), dict(dropped))


_Raw = tuple[str, list[str], list[str] | None]


def _encode(
    model: "HookedMamba",
    prompt: str,
    right: list[str],
    wrong: list[str] | None,
    single: bool,
    prepend_bos: bool | None,
) -> TextItem | str:
    """The item, or why it is dropped."""
    if not prompt.strip():
        return "the prompt is empty"
    ids = model.encode_texts([prompt], prepend_bos)[0][0]
    yes, no = (
        None if answers is None else tuple(tuple(row) for row in model.encode_texts(answers, False)[0])
        for answers in (right, wrong)
    )
    assert yes is not None
    if single and any(len(answer) != 1 for answer in (*yes, *(no or ()))):
        return "an answer is more than one token"
    if no is not None and set(yes) & set(no):
        return "right and wrong are the same"
    if model.encode_texts([prompt + right[0]], prepend_bos)[0][0] != [*ids, *yes[0]]:
        return "the answer changes the prompt's tokens"
    return TextItem(tuple(ids), yes, no)


def _find(name: str, folder: Path, file: str) -> Path:
    for path in (folder / file, folder / f"{file}.xz"):
        if path.is_file():
            return path
    raise LoadError(
        f"text task {name!r} reads {file} (or {file}.xz), which is not in {folder}; give the folder that has it"
    )


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8-sig")
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    except (lzma.LZMAError, EOFError) as error:
        raise LoadError(f"{path} is not a whole xz file ({error})") from None
    except UnicodeDecodeError as error:
        raise LoadError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


_WORD = re.compile(r"\w+")


def _ioi(text: str) -> Iterator[_Raw]:
    """The clean prompt and the hard corruption differ in one word: the subject's second mention, and the object."""
    for row in csv.DictReader(io.StringIO(text)):
        clean, hard = _WORD.findall(row["clean"]), _WORD.findall(row["corrupted_hard"])
        differ = [(a, b) for a, b in zip(clean, hard, strict=True) if a != b]
        subject, other = differ[0]
        yield row["clean"], [f" {other}"], [f" {subject}"]


def _greater_than(text: str) -> Iterator[_Raw]:
    """Ends of the second year, 00 … 99: after the first year's against up to it."""
    ends = [f"{year:02d}" for year in range(100)]
    for row in csv.DictReader(io.StringIO(text)):
        first = int(row["label"])
        if not 0 <= first < 99:
            raise ValueError(f"label {first} leaves no later year")
        yield row["clean"], ends[first + 1 :], ends[: first + 1]


def _agreement(text: str) -> Iterator[_Raw]:
    for line in text.splitlines():
        if line.strip():
            row = json.loads(line)
            yield row["clean_prefix"], [row["clean_answer"]], [row["patch_answer"]]


def _facts(text: str) -> Iterator[_Raw]:
    for row in json.loads(text):
        yield row["prompt"], [f" {row['attribute'].strip()}"], None


def _lambada(text: str) -> Iterator[_Raw]:
    for line in text.splitlines():
        if line.strip():
            before, _, word = json.loads(line)["text"].rstrip().rpartition(" ")
            yield before, [f" {word}"], None


TEXT_TASKS: dict[str, tuple[str, Callable[[str], Iterator[_Raw]]]] = {
    "ioi": ("ioi_pairs.csv", _ioi),
    "greater_than": ("greater_than.csv", _greater_than),
    "sva_simple": ("sva_simple.json", _agreement),
    "sva_nounpp": ("sva_nounpp.json", _agreement),
    "sva_within_rc": ("sva_within_rc.json", _agreement),
    "known_facts": ("known_1000.json", _facts),
    "lambada": ("lambada_test.jsonl", _lambada),
}
"""Each task's file, and how its prompts and answers are read from it."""
