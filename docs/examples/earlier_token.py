"""Where is an earlier token remembered? Both embedded models, by patching every state, and by predicting it.

    python docs/examples/earlier_token.py    # docs/results/earlier_token.csv and, where Chromium is, two pictures

`induction-2l` reads random tokens; once a special one, then the answer; at the end the special one again. `lm-mini`
reads "The town of Lincoln lies in the north. The town of": does it say Lincoln, or the town that stands there in the
corrupted text? For every layer and position the corrupted run is given the clean run's residual stream, scan input u,
or state h.
"""

import csv
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

import mambascope as ms
from mambascope.analyses import sweep_figure

SITES = ["resid_pre", "u", "h"]
TOWNS = [" Lincoln", " London", " Paris", " York"]
RESULTS = Path(__file__).resolve().parents[1] / "results"


def induction() -> tuple[ms.Sweep, ms.Sweep]:
    """Eight random texts of 24 tokens; the special token at 10, the answer at 11: measured and predicted."""
    model = ms.load("induction-2l")
    special = model.cfg.d_vocab - 1
    corrupted = torch.randint(0, special, (8, 24), generator=torch.Generator().manual_seed(0))
    corrupted[:, [10, -1]] = special
    clean = corrupted.clone()
    clean[:, 11] = (corrupted[:, 11] + 1 + torch.arange(8)) % special
    metric = ms.LogitDifference(clean[:, 11].tolist(), corrupted[:, 11].tolist())
    return (
        ms.sweep(model, clean, corrupted, metric, SITES),
        ms.attribute(model, clean, corrupted, metric, SITES, steps=16),
    )


def towns() -> tuple[ms.Sweep, ms.Sweep]:
    """Four towns, each in the place of the next."""
    model = ms.load("lm-mini")
    others = TOWNS[1:] + TOWNS[:1]
    clean, corrupted = ([f"The town of{t} lies in the north. The town of" for t in names] for names in (TOWNS, others))
    metric = ms.LogitDifference(TOWNS, others)
    return ms.sweep(model, clean, corrupted, metric, SITES), ms.attribute(model, clean, corrupted, metric, SITES)


def rows(name: str, measured: ms.Sweep, predicted: ms.Sweep) -> list[list[str]]:
    """The record: a row a place, scores with four digits."""
    table = measured.table()
    table["predicted"] = predicted.table()["score"]
    columns = ("site", "layer", "position", "token", "score", "predicted")
    return [
        [name, *(f"{round(v, 4) + 0.0:.4f}" if isinstance(v, float) else str(v) for v in row)]
        for row in table[list(columns)].itertuples(index=False)
    ]


def draw(figure: Any, path: Path) -> None:
    """The figure as a picture, by a browser that is asked for nothing outside the page; a line where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print(f"{path.name} is left as it is: no Chromium here to draw it")
        return
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.write_html(page, include_plotlyjs=True, default_width="1000px", config={"displayModeBar": False})
        size = f"--window-size=1016,{int(figure.layout.height) + 16}"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size]
        command = [browser, *options, f"--screenshot={path}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - a page of our own


def main() -> None:
    with (RESULTS / "earlier_token.csv").open("w", newline="", encoding="utf-8") as out:
        out.write(
            f"# python docs/examples/earlier_token.py; seed 0; {platform.machine()} CPU, torch {torch.__version__}\n"
        )
        writer = csv.writer(out)
        writer.writerow(["model", "site", "layer", "position", "token", "score", "predicted"])
        for name, (measured, predicted) in (("induction-2l", induction()), ("lm-mini", towns())):
            writer.writerows(rows(name, measured, predicted))
            draw(sweep_figure(measured, "h"), RESULTS / f"earlier_token_{name}.png")


if __name__ == "__main__":
    main()
