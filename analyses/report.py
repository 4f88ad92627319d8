"""The page: one HTML file that shows an overview and needs nothing but itself.

plotly.js is embedded once; a content policy in the page forbids every network request. Whatever comes from the
text, the tokenizer or the model's name is escaped: as HTML in the body, as ``\\u003c`` inside the data blocks, and
once more inside figures, because plotly reads a small HTML in its labels. Controls and bidirectional marks are
spelled out, so that a text can neither hide from nor reorder the page.
"""

import html
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly
from torch import Tensor

from mambascope.analyses.labels import short, visible
from mambascope.analyses.plots import Numbers, array, escaped, token_map
from mambascope.analyses.report_assets import SCRIPT, STYLE
from mambascope.errors import InputError
from mambascope.storage import write_bytes

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from mambascope.analyses.overview import Overview

__all__ = ["page", "save"]

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_DELTA = (
    "The step size, averaged over channels. Large: the layer takes the token in and lets go of the past. Near zero: it "
    "passes the token by and keeps what it has. Logarithmic colours."
)
_NORM = (
    "How much each layer's state holds after each token (Frobenius norm over channels and state dimensions). "
    "Logarithmic colours."
)
_LENS = (
    "The residual stream after each layer, read by the final norm and unembedding as if the model ended there: the "
    "probability of the token that really comes next. Zoom in to see each layer's best guess."
)
_LISTED = 16  # sources named beside their map


def page(overview: "Overview") -> str:
    """The page as text, about 5 MB of it plotly.js. Same overview, same bytes."""
    from plotly.offline import get_plotlyjs

    about = overview.about
    excerpt = " ".join("".join(overview.labels).split())
    title = f"{about['model']} · {excerpt[:60]}"
    plots = _plots(overview)
    sections = [_text(overview), *_maps(overview, plots), _table(overview)]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<title>{_html(title)}</title><link rel="icon" href="data:,">',
            f"<style>{STYLE}</style></head><body>",
            _header(overview),
            "<main>",
            *sections,
            "</main>",
            _footer(about),
            f'<script type="application/json" id="data">{_json(_data(overview))}</script>',
            f'<script type="application/json" id="figures">{_json(_figures(plots))}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{SCRIPT}</script>",
            "</body></html>\n",
        ]
    )


def save(overview: "Overview", path: str | Path) -> Path:
    """Write the page whole or not at all. InputError where the place cannot be written."""
    path = Path(path)
    data = page(overview).encode("utf-8", errors="backslashreplace")
    try:
        if path.is_dir():
            raise InputError(f"{str(path)!r} is a folder; give the page a file name")
        write_bytes(path, data)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"the page cannot be written to {str(path)!r}: {reason}") from None
    return path


# ---- escaping


def _html(text: str, spaces: bool = False) -> str:
    return html.escape(visible(text, spaces), quote=True)


def _json(value: Any) -> str:
    """JSON that no HTML parser can mistake for markup."""
    plain = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


# ---- parts


def _header(overview: "Overview") -> str:
    about = overview.about
    loss = about["mean_loss"]
    facts = [
        ("tokens", f"{about['tokens']:,}"),
        ("loss, nats a token", "–" if loss is None else f"{loss:.3f}"),
        ("perplexity", "–" if loss is None or loss > 700 else _number(math.exp(loss))),
        ("layers", str(about["layers"])),
        ("parameters", f"{about['parameters']:,}"),
        ("channels × state", f"{about['d_inner']:,} × {about['d_state']}"),
    ]
    cells = "".join(f"<div><dt>{_html(name)}</dt><dd>{_html(value)}</dd></div>" for name, value in facts)
    notice = ""
    if about["tokens_before"]:
        notice = (
            f'<div class="notice">The text has {about["tokens_before"] + about["tokens"]:,} tokens. The first '
            f"{about['tokens_before']:,} were read and live on in the state; the last {about['tokens']:,} are shown. "
            "Their numbers are those of the whole text.</div>"
        )
    return (
        f'<header><div class="mark">mambascope</div><h1>{_html(about["model"])}</h1>'
        f'<dl class="facts">{cells}</dl>{notice}</header>'
    )


def _footer(about: dict[str, Any]) -> str:
    made = (
        f"mambascope {about['mambascope']}, torch {about['torch']}, plotly {plotly.__version__}, "
        f"Python {about['python']}; {about['dtype']} on {about['device']}, backend {about['backend']}; "
        f"{'a BOS token in front' if about['bos'] else 'no BOS token in front'}."
    )
    return f"<footer>Made by {_html(made)}</footer>"


def _text(overview: "Overview") -> str:
    spans = []
    for label in overview.labels:
        lines = [_html(part) for part in label.split("\n")]
        spans.append(f"<span>{'<i>⏎</i><br>'.join(lines)}</span>")
    buttons = "".join(
        f'<button type="button" value="{name}" aria-pressed="false">{title}</button>'
        for name, (title, _) in _metrics(overview).items()
    )
    return (
        "<section><h2>The text</h2><p>Each token, shaded by what is chosen; stronger is more. "
        "Loss: how unexpected the token was.</p>"
        f'<div class="bar"><div class="choice" role="group" aria-label="shade by">{buttons}</div>'
        '<div id="about">Point at a token.</div></div>'
        f'<div id="text" class="scroll">{"".join(spans)}</div></section>'
    )


def _metrics(overview: "Overview") -> dict[str, tuple[str, Tensor]]:
    return {
        "loss": ("Loss", overview.predictions.loss),
        "delta": ("Delta", overview.gating.delta.mean(0)),
        "norm": ("State norm", overview.states.norm.mean(0)),
    }


def _maps(overview: "Overview", plots: "dict[str, go.Figure]") -> list[str]:
    per = {name: _per_cell(figure) for name, figure in plots.items()}
    sources = overview.sources
    query = _html(overview.labels[sources.query], spaces=True)
    carried = (
        f" The state before the first token shown adds {float(_carry_share(overview).mean()):.1%} on average."
        if overview.start
        else ""
    )
    last = sources.query == len(overview.labels) - 1
    reader = "the last token" if last else f"token {overview.start + sources.query:,}"
    reads = (
        "Through the state of each layer, exactly: y = Σ alpha·u over earlier tokens (they add up to y within "
        f"{float(sources.error.max()):.0e}). Colour: each token's share of a layer's Σ|alpha·u| "
        f"({_html(sources.reduce.replace('_', ' '))} over channels, so signs do not cancel), logarithmic over four "
        f"decades.{carried}"
    )
    maps = [
        _map("delta", "Delta", _DELTA, per["delta"]),
        _map("norm", "State norm", _NORM, per["norm"]),
        _map("lens", "Logit lens", _LENS, per["lens"]),
        _map("sources", f"What {reader} reads: <code>{query}</code>", reads, per["sources"], _source_list(overview)),
    ]
    return [*maps, _relevance(overview, per)]


def _relevance(overview: "Overview", per: dict[str, int]) -> str:
    found = overview.relevance
    title = "Where the best guess comes from"
    if found is None:
        return f"<section><h2>{title}</h2><p>Not traced: {_html(overview.untraced)}.</p></section>"
    target = _html(found.target.name)
    text = (
        f"{target[:1].upper()}{target[1:]}, {found.target.value:.2f}, traced back from the last layer to the "
        "embeddings: each row says which tokens hold it at that depth (relevance, half to either side of a gate, norms "
        "and selection held; blue adds, red takes away; logarithmic colours over three decades). "
        f"Biases and earlier state hold {found.target.value - float(found.tokens.sum()):.2f} of it at the embeddings."
    )
    return _map("relevance", title, text, per["relevance"])


def _map(name: str, title: str, text: str, per: int, extra: str = "") -> str:
    joined = "" if per == 1 else f" Each cell shows the largest of {per} neighbouring tokens."
    return f'<section><h2>{title}</h2><p>{text}{joined}</p><div class="plot" id="plot-{name}"></div>{extra}</section>'


def _carry_share(overview: "Overview") -> Tensor:
    return 1 - overview.sources.share.sum(-1)


def _source_list(overview: "Overview") -> str:
    share = overview.sources.share.mean(0)
    value, at = share.topk(min(_LISTED, len(share)))
    top = max(float(value[0]), 1e-12)
    items = "".join(
        f"<li><code>{_html(short(overview.labels[i]))} <small>{overview.start + i:,}</small></code>"
        f'<span class="meter"><i style="width:{100 * v / top:.1f}%"></i></span><span class="number">{v:.1%}</span></li>'
        for v, i in zip(value.tolist(), at.tolist(), strict=True)
    )
    return f'<p>Mean share over layers, largest first:</p><ol class="sources">{items}</ol>'


def _table(overview: "Overview") -> str:
    loss, delta, norm = (values.tolist() for _, values in _metrics(overview).values())
    p = overview.predictions.next.p.tolist()
    rows = []
    for i, label in enumerate(overview.labels):
        guesses = "".join(
            f'<span class="guess"><code>{_html(short(g, 24))}</code> <small>{q:.2f}</small></span>'
            for g, q in zip(overview.predictions.guesses[i], p[i], strict=True)
        )
        numbers = "".join(f'<td class="number">{_number(v[i])}</td>' for v in (loss, delta, norm))
        rows.append(
            f'<tr><td class="number">{overview.start + i:,}</td><td><code>{_html(label, spaces=True)}</code></td>'
            f'{numbers}<td class="wide">{guesses}</td></tr>'
        )
    return (
        "<section><h2>Token by token</h2><p>Loss in nats; delta and state norm averaged over layers; the best guesses "
        "for the token that follows, with their probabilities.</p>"
        '<div class="table"><table><thead><tr><th class="number">at</th><th>token</th><th class="number">loss</th>'
        '<th class="number">delta</th><th class="number">state norm</th><th>next</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


# ---- data for the script


def _shade(values: Numbers, log: bool) -> list[float]:
    """0…1 between the 2nd and 98th percentile, so that one outlier does not pale the rest."""
    if log:
        values = np.log(np.where(values > 0, values, np.nan))
    known = values[np.isfinite(values)]
    if not len(known):
        return [0.0] * len(values)
    low, high = np.percentile(known, (2, 98))
    scaled = (values - (low if log else 0.0)) / max(high - (low if log else 0.0), 1e-12)
    return [round(float(v), 3) for v in np.clip(np.nan_to_num(scaled, nan=0.0), 0, 1)]


def _data(overview: "Overview") -> dict[str, Any]:
    metrics = {}
    for name, (title, values) in _metrics(overview).items():
        plain = array(values)
        metrics[name] = {
            "title": title,
            "values": [float(f"{v:.5g}") if math.isfinite(v) else None for v in plain.tolist()],
            "shade": _shade(plain, log=name != "loss"),
        }
    names = [visible(label) for label in overview.labels]
    ticks = [escaped(short(label, 12)) for label in overview.labels]
    return {"start": overview.start, "names": names, "ticks": ticks, "metrics": metrics}


def _plots(overview: "Overview") -> "dict[str, go.Figure]":
    sources = overview.sources
    share = array(sources.share)
    top = share.max() if share.size else 1.0
    floor = np.maximum(share, top * 1e-4)  # four decades; what lies below is as good as nothing
    reads = token_map(floor, sources.labels, "", "share", log=True, start=overview.start)
    plots = {
        "delta": overview.gating.figure(),
        "norm": overview.states.figure(),
        "lens": overview.lens.figure(),
        "sources": reads,
    }
    return plots if overview.relevance is None else {**plots, "relevance": overview.relevance.figure()}


def _per_cell(figure: "go.Figure") -> int:
    x = figure.data[0].x  # type: ignore[attr-defined]
    return int(x[1] - x[0]) if len(x) > 1 else 1


def _figures(plots: "dict[str, go.Figure]") -> list[dict[str, Any]]:
    out = []
    for name, figure in plots.items():
        figure.update_layout(template=None, title=None)
        out.append({"name": name, **json.loads(figure.to_json() or "{}")})
    return out
