"""Activation-patching sweeps: put the clean run's value into the corrupted run, one place at a time, at every place.

``over`` says which places, ``engine`` runs them at the price of their suffixes, ``file`` keeps what is done.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mambascope.errors import InputError
from mambascope.hooks.metrics import Metric
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.sweeps.engine import Engine
from mambascope.hooks.sweeps.file import SweepFile
from mambascope.hooks.sweeps.over import grid_of
from mambascope.hooks.sweeps.progress import bar
from mambascope.hooks.sweeps.result import Sweep, load_sweep
from mambascope.hooks.sweeps.texts import Align, pairs_of

__all__ = ["Sweep", "load_sweep", "sweep"]

_TINY = 0.1  # of the spread of the logits: below it the two texts hardly differ in the metric


@torch.no_grad()
def sweep(
    model: Runnable,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    over: Any = "resid_pre",
    *,
    align: Align | None = None,
    keep: int | None = 1,
    file: str | Path | None = None,
    progress: bool | None = None,
    prepend_bos: bool | None = None,
) -> Sweep:
    """Activation patching at every layer and position (causal tracing, Meng et al., 2202.05262), only the suffixes run.

    For each place: the corrupted text is run with the activation there replaced by the clean run's, and the metric is
    taken. A place at layer i and position p costs the layers from i on and the tokens from p on.

    Args:
        clean, corrupted: a text, texts, or ids ``B L``, one for one. The metric is taken over all pairs.
        metric: of :mod:`mambascope.hooks.metrics` (``ms.LogitDifference(right, wrong)``, ``ms.Loss()``, …), or a
            function of logits ``B k V`` that returns one number.
        over: a site (``"resid_pre"``, ``"h"``, ``"delta"``, any point within a block but A_bar, B_bar, write), a list
            of sites, or a dict: ``sites``, ``layers``, ``positions`` (default: all), ``channels`` (a list of channels
            or of groups, each patched alone, counted on the site's last axis, at ``"h"`` on D).
        align: ``"start"`` or ``"end"``, for texts of different lengths: position -1 is then the last token of each.
        keep: how many last positions a function metric is given; None: all.
        file: write every finished piece here, and go on from what is done there. A sweep that was interrupted gives
            the numbers it would have given; nothing is computed twice.
        progress: show a bar; None: in a terminal or notebook.

    Returns:
        `Sweep`: ``.table()`` (pandas), ``.score`` (0 as corrupted, 1 as clean), ``.values``, ``.change``.
        Time O(places · layers · L · D N) / 4 for all layers and positions.

    Raises:
        InputError: texts that do not pair (the rows are named), answers that are not one token, a metric that is NaN
            or no single number. HookError, UnknownNameError: a site that cannot be patched by position.
        SweepError: a file of other inputs (what differs is named), in use, or not writable.

    Warns where the two texts hardly differ in the metric, so that the score is noise.
    """
    pairs = pairs_of(model, clean, corrupted, align, prepend_bos)
    grid = grid_of(model, pairs, over)
    engine = Engine(model, pairs, grid, metric, keep)
    if file is not None and engine.hooked:
        raise InputError(
            "hooks are in force on this model, which a file cannot tell apart: remove them, or leave file="
        )
    # past no_grad's wrapper: the caller
    warn_if_tiny(engine.clean, engine.corrupted, engine.bound.spec, engine.spread)
    tokens = pairs.labels(model, grid.positions)
    kept = None
    if file is not None:
        about = {
            "tokens": tokens,
            "clean metric": engine.clean,
            "corrupted metric": engine.corrupted,
            "model": model.cfg.name,
            "torch": torch.__version__,
        }
        kept = SweepFile(file, _asked(model, engine), about, grid.size)
    try:
        values, done, computed = _run(engine, kept, progress)
    finally:
        if kept is not None:
            kept.close()
    shape = grid.shape
    return Sweep(
        values.view(shape),
        done.view(shape),
        engine.clean,
        engine.corrupted,
        grid,
        tokens,
        engine.bound.spec,
        computed,
    )


def _run(engine: Engine, kept: SweepFile | None, progress: bool | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    size = engine.grid.size
    values = torch.full((size,), float("nan"), dtype=torch.float64) if kept is None else kept.values
    done = torch.zeros(size, dtype=torch.bool) if kept is None else kept.done
    computed = 0
    try:
        with bar("sweep", size, int(done.sum()), progress) as advance:
            for piece in engine.pieces():
                if bool(done[piece].all()):
                    continue
                found = engine.run(piece)
                if kept is not None:
                    kept.put(piece, found)
                else:
                    values[piece], done[piece] = found, True
                computed += len(piece)
                advance(len(piece))
    except KeyboardInterrupt as stop:
        left = size - int(done.sum())
        how = "the same call goes on from there" if kept is not None else "give file= to be able to go on"
        stop.add_note(f"sweep interrupted with {size - left} of {size} edits done; {how}")
        raise
    return values, done, computed


def warn_if_tiny(clean: float, corrupted: float, spec: dict[str, Any], spread: float, level: int = 4) -> None:
    """Warn where a score would divide by next to nothing."""
    scale = abs(clean - corrupted)
    logits = spec["metric"] == "LogitDifference"
    if scale >= (_TINY * spread if logits else 1e-3 * max(abs(clean), abs(corrupted))) and scale > 0:
        return
    about = f"where logits spread by {spread:.2g}" if logits else f"around {corrupted:.4g}"
    unit = " logits" if logits else ""
    warnings.warn(
        f"clean and corrupted differ by {scale:.2g}{unit}, {about}: the score divides by this and is mostly noise",
        stacklevel=level,
    )


def _asked(model: Runnable, engine: Engine) -> dict[str, Any]:
    """Everything that a sweep's numbers depend on."""
    grid, pairs = engine.grid, engine.pairs
    return {
        "weights": model.weight_hash(),
        "clean": pairs.clean,
        "corrupted": pairs.corrupted,
        "align": pairs.align,
        "metric": engine.bound.spec,
        "sites": grid.sites,
        "layers": grid.layers,
        "positions": grid.positions,
        "channels": grid.channels,
        "device": model.device.type,
        "dtype": str(model.dtype),
        "backend": engine.ready[0].base.backend,
        "intervals": [r.interval for r in engine.ready],
    }
