"""How much of a model is a plain convolution: what freezing delta, B and C costs on a text, layer by layer.

    python -m tests.bench.bench_selectivity TEXT --model lm-mini --rows 16 --length 256 --out docs/results/…csv

TEXT is a UTF-8 file; ``rows`` pieces of ``length`` tokens are taken at even distances, the even ones to average delta,
B and C over, the odd ones to measure the loss on. Nothing is timed; the numbers repeat to rounding.
"""

import argparse
import platform
from pathlib import Path

import torch

import mambascope as ms
from mambascope.analyses import freezing_cost, lti_view, mean_selection, read, timescale_spectrum
from tests.bench.origin import commit


def pieces(model: ms.HookedMamba, path: Path, rows: int, length: int) -> torch.Tensor:
    """``2 * rows`` pieces of the text at even distances, ids ``2R L``."""
    ids = model.to_tokens(path.read_text(encoding="utf-8"), prepend_bos=False)[0]
    step = (len(ids) - length) // (2 * rows - 1)
    if step < length:
        raise SystemExit(f"{path} has {len(ids)} tokens, too few for {2 * rows} pieces of {length} that do not overlap")
    return torch.stack([ids[i * step : i * step + length] for i in range(2 * rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="lm-mini")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = ms.load(args.model)
    ids = pieces(model, args.text, args.rows, args.length)
    means = mean_selection(model, ids[::2])
    cost = freezing_cost(model, ids[1::2], selection=means)
    table = cost.table()
    views = [read(model, row) for row in ids[1::2][:4]]
    explained = [sum(lti_view(model, v, i, selection=means).explained for v in views) / len(views) for i in cost.layers]
    half_lives = timescale_spectrum(model, ids[1::2].flatten()[:2048]).table()
    table["explained"] = [*explained, float("nan")]
    table["half-life 50%"] = [*half_lives["50%"], float("nan")]
    facts = f"{args.model}, {args.text.name}, {ids[1::2].numel():,} tokens measured, loss {cost.loss:.4f} nats"
    about = f"torch {torch.__version__}, Python {platform.python_version()}, {model.device}, commit {commit()}"
    print(facts, about, table.round(4).to_string(index=False), sep="\n")
    if args.out is not None:
        table.insert(0, "run", f"{facts}; {about}")
        table.to_csv(args.out, index=False, float_format="%.5f")


if __name__ == "__main__":
    main()
