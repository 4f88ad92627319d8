"""Text tasks: read from files of the given forms, kept by the tokenizer, scored as by hand; random: chance."""

import csv
import json
import lzma
import math
from pathlib import Path

import pytest
import torch
from hand_built import random_model

from mambascope.analyses.tasks import load_text_task
from mambascope.analyses.tasks.text import TextItem, TextTask
from mambascope.errors import InputError, LoadError, UnknownNameError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Small files in the forms of the evaluation sets; sentences of our own."""
    home = tmp_path_factory.mktemp("eval")
    with (home / "ioi_pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["", "clean", "corrupted", "corrupted_hard", "correct_idx", "incorrect_idx"])
        a = "Later A and B sat down. A gave a pen to"
        rows.writerow([0, a, a.replace(". A", ". C"), a.replace(". A", ". B"), 1, 2])
        b = "Later Ann and Bob sat down. Bob gave a pen to"
        rows.writerow([1, b, b.replace(". Bob", ". Cy"), b.replace(". Bob", ". Ann"), 1, 2])
    with (home / "greater_than.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["clean", "corrupted", "label"])
        rows.writerow(["It ran from the year 1732 to the year 17", "It ran from the year 1701 to the year 17", "32"])
    pair = {
        "clean_prefix": "The dogs",
        "patch_prefix": "The dog",
        "clean_answer": " x",
        "patch_answer": " y",
        "case": "p",
    }
    for name in ("simple", "nounpp", "within_rc"):
        other = pair | {"clean_answer": " are", "patch_answer": " is"}
        (home / f"sva_{name}.json").write_text("\n".join(json.dumps(p) for p in (pair, other, pair)) + "\n")
    facts = [{"prompt": "The capital of X is", "attribute": "Y"}, {"prompt": "The capital of Y is", "attribute": "Yz"}]
    (home / "known_1000.json").write_text(json.dumps(facts))
    lines = "\n".join(json.dumps({"text": f"He said so and then he was {w}"}) for w in ("gone", "Q"))
    (home / "lambada_test.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    return home


def log_probability(model, prompt: str, answer: str) -> float:
    """Sum of log p of the answer's tokens, one forward a token."""
    ids, total = model.to_tokens(prompt)[0].tolist(), 0.0
    for token in model.to_tokens(answer, prepend_bos=False)[0].tolist():
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1, : model.cfg.n_tokens]
        total += float(torch.log_softmax(logits.double(), -1)[token])
        ids.append(token)
    return total


def test_what_is_kept_depends_on_the_tokenizer(speaking, folder) -> None:
    # a token a byte: " x" is two tokens
    strict = load_text_task("sva_simple", folder, speaking)
    assert (strict.given, len(strict.items)) == (3, 0)
    assert strict.dropped == {"an answer is more than one token": 3}
    score = strict.score(speaking)
    assert math.isnan(score.accuracy)
    assert score.interval == (0.0, 1.0)
    free = load_text_task("sva_simple", folder, speaking, single_tokens=False)
    assert (free.given, len(free.items), free.dropped) == (3, 3, {})
    assert load_text_task("greater_than", folder, speaking, single_tokens=False).given == 1


def test_names_are_found_by_what_differs(speaking, folder) -> None:
    items = load_text_task("ioi", folder, speaking, single_tokens=False).items
    texts = [[speaking.to_string(list(ids)) for ids in (item.right[0], (item.wrong or ())[0])] for item in items]
    assert texts == [[" B", " A"], [" Ann", " Bob"]]


@pytest.mark.parametrize("name", ["ioi", "greater_than", "sva_nounpp", "known_facts", "lambada"])
def test_scores_equal_a_count_by_hand(speaking, folder, name: str) -> None:
    task = load_text_task(name, folder, speaking, single_tokens=False)
    score = task.score(speaking, tokens_at_once=64)
    right, odds, gap = 0, 0.0, 0.0
    for item in task.items:
        prompt = speaking.to_string(list(item.prompt))
        sums = [
            sum(math.exp(log_probability(speaking, prompt, speaking.to_string(list(ids)))) for ids in side)
            for side in (item.right, item.wrong or ())
        ]
        if item.wrong is None:
            greedy = speaking.generate(prompt, max_new_tokens=len(item.right[0]), temperature=0)
            right += str(greedy).endswith(speaking.to_string(list(item.right[0])))
            odds += math.log(sums[0] / (1 - sums[0]))
            gap += sums[0]
        else:
            right += sums[0] > sums[1]
            odds += math.log(sums[0] / sums[1])
            gap += sums[0] - sums[1]
    assert score.right == right
    assert score.difference == pytest.approx(odds / len(task.items), rel=1e-3, abs=1e-4)
    assert score.probability == pytest.approx(gap / len(task.items), rel=1e-3, abs=1e-7)
    row = score.row()
    assert row["given"] == task.given
    assert row["kept"] == len(task.items)


def test_greater_than_counts_the_years(speaking, folder) -> None:
    (item,) = load_text_task("greater_than", folder, speaking, single_tokens=False).items
    assert [speaking.to_string(list(ids)) for ids in (item.right[0], item.right[-1])] == ["33", "99"]
    assert len(item.right) == 67
    assert len(item.wrong or ()) == 33


def test_random_weights_are_at_chance() -> None:
    rng = torch.Generator().manual_seed(0)
    model = random_model(d_vocab=40)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(40, shape, generator=rng)

    pairs = [(tuple(ids(9).tolist()), torch.randperm(40, generator=rng)[:2].tolist()) for _ in range(400)]
    items = tuple(TextItem(prompt, ((a,),), ((b,),)) for prompt, (a, b) in pairs)
    score = TextTask("pairs", items, 400, {}).score(model)
    low, high = score.interval
    assert low < 0.5 < high
    assert score.chance == 0.5
    knowing = tuple(
        TextItem(item.prompt, ((int(model(torch.tensor([item.prompt]))[0, -1].argmax()),),), None)
        for item in items[:20]
    )
    assert TextTask("knows", knowing, 20, {}).score(model).accuracy == 1.0, "the bar above can be passed"


def test_bad_files_and_names(speaking, random, folder, tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="no text task 'lambda', did you mean 'lambada'"):
        load_text_task("lambda", folder, speaking)
    with pytest.raises(InputError, match="'ioi' needs a tokenizer"):
        load_text_task("ioi", folder, random)
    with pytest.raises(LoadError, match=r"'ioi' reads ioi_pairs.csv \(or ioi_pairs.csv.xz\), which is not in"):
        load_text_task("ioi", tmp_path, speaking)
    for name, file, text in (
        ("ioi", "ioi_pairs.csv", "a,b\n1,2\n"),
        ("greater_than", "greater_than.csv", "clean,corrupted,label\nx,y,99\n"),
        ("sva_simple", "sva_simple.json", "{"),
        ("known_facts", "known_1000.json", "[{}]"),
        ("lambada", "lambada_test.jsonl", '{"text": 3}'),
    ):
        (tmp_path / file).write_text(text)
        with pytest.raises(LoadError, match=f"{file} is not in the form of text task '{name}'"):
            load_text_task(name, tmp_path, speaking)
    (tmp_path / "known_1000.json").write_text("[]")
    with pytest.raises(LoadError, match="holds no item"):
        load_text_task("known_facts", tmp_path, speaking)
    (tmp_path / "lambada_test.jsonl").unlink()
    (tmp_path / "lambada_test.jsonl.xz").write_bytes(b"none")
    with pytest.raises(LoadError, match="not a whole xz file"):
        load_text_task("lambada", tmp_path, speaking)
