"""The command line: ``mambascope scope "text"`` looks inside a model, ``mambascope models`` lists them.

Nothing heavy is imported before a command needs it, so that ``--help`` and ``--version`` are instant.
"""

import re
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import mambascope
from mambascope.errors import InputError, MambascopeError

if TYPE_CHECKING:
    from mambascope.analyses.overview import Overview

__all__ = ["app", "main"]

_ROWS = 64  # table rows printed in full

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mambascope {mambascope.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """See inside Mamba language models."""


@app.command()
def models() -> None:
    """List the models that --model knows by name; any hub id or model folder works as well."""
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "size", "where", "licence", box=None, pad_edge=False, header_style="bold")
    for info in mambascope.list_models():
        where = "with this package" if info.embedded else f"hub: {info.hub_id}"
        table.add_row(info.name, info.size, where, info.licence)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


_Text = Annotated[
    str | None,
    typer.Argument(
        help="The text to look at; '-' reads standard input (less the last line break).", show_default=False
    ),
]
_Model = Annotated[str, typer.Option("--model", "-m", help="A name of 'mambascope models', a folder, or a hub id.")]
_File = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f", help="Read the text from a UTF-8 file (less the last line break).", show_default=False
    ),
]
_Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="The page to write; by default a file here.", show_default=False)
]
_Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON; a page only with --out.")]
_Top = Annotated[int, typer.Option("--top", help="Guesses for the next token to show.")]
_Max = Annotated[
    int, typer.Option("--max-tokens", help="Show the last N tokens; earlier ones are read and live on in the state.")
]
_Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, …; the GPU if there is one.", show_default=False)
]
_Backend = Annotated[str, typer.Option("--backend", help="auto, triton, cpu, torch or reference.")]


@app.command()
def scope(
    text: _Text = None,
    model: _Model = "lm-mini",
    file: _File = None,
    out: _Out = None,
    as_json: _Json = False,
    top: _Top = 5,
    max_tokens: _Max = 2048,
    device: _Device = None,
    backend: _Backend = "auto",
) -> None:
    """Look inside a model on a text: a table here, and a page with delta, states, the logit lens and what is read."""
    content = _text(text, file)
    from mambascope.ops import BACKENDS  # torch comes with it: after everything cheap has been checked

    if backend not in BACKENDS:
        raise InputError(f"--backend {backend!r} is unknown; known: {', '.join(BACKENDS)}")
    from mambascope.analyses.overview import scope as overview_of

    path = out if out is not None else None if as_json else Path(_file_name(content))
    if path is not None and not path.parent.is_dir():
        raise InputError(f"the page cannot be written to {str(path)!r}: there is no folder {str(path.parent)!r}")
    with _waiting(f"reading with {model} …"):
        loaded = mambascope.load(model, device=device, backend=backend)  # type: ignore[arg-type]
        found = overview_of(loaded, content, top=top, max_tokens=max_tokens)
    written = None if path is None else found.save(path)
    if as_json:
        import json

        typer.echo(json.dumps(found.to_dict(), ensure_ascii=True, allow_nan=False))
    else:
        _print(found)
    if written is not None:
        typer.echo(f"page: {written}", err=as_json)


def _waiting(what: str) -> AbstractContextManager[Any]:
    """A spinner while the model reads; nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(escape(what))


def _text(text: str | None, file: Path | None) -> str:
    """The text from the argument, the file, or standard input."""
    if text is not None and file is not None:
        raise InputError("give a text or --file, not both")
    if file is not None:
        try:
            return _decoded(file.read_bytes(), str(file))
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise InputError(f"{str(file)!r} cannot be read: {reason}") from None
    if text is None:
        raise InputError("there is no text: give one, --file PATH, or '-' for standard input")
    if text == "-":
        return _decoded(sys.stdin.buffer.read(), "standard input")
    return text


def _decoded(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {data[error.start]:#04x}"
        raise InputError(f"{where} is not UTF-8: {byte}; convert it first") from None
    return text.removesuffix("\n").removesuffix("\r")  # the end of the last line is no part of the text


def _file_name(content: str) -> str:
    """``mambascope-the-first-words.html``."""
    words = re.findall(r"[^\W_]+", content[:200].lower())
    slug = "-".join(words[:5])[:40].strip("-")
    return f"mambascope-{slug}.html" if slug else "mambascope.html"


def _print(found: "Overview") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mambascope.analyses.labels import short

    def cell(text: str, style: str = "") -> Text:  # never markup: a token may well be "[/b]"
        return Text(text, style=style, no_wrap=True, overflow="ellipsis")

    about = found.about
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    loss = "" if about["mean_loss"] is None else f", {about['mean_loss']:.3f} nats a token"
    before = f" (after {about['tokens_before']:,} read before them)" if about["tokens_before"] else ""
    console.print(cell(f"{about['model']}: {about['layers']} layers, {about['tokens']:,} tokens{before}{loss}", "bold"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("at", "token", "loss", "delta", "state norm", "next"):
        side: Literal["left", "right"] = "left" if name in ("token", "next") else "right"
        table.add_column(name, justify=side, no_wrap=True, overflow="ellipsis")
    losses, next_p = found.predictions.loss.tolist(), found.predictions.next.p.tolist()
    delta, norm = found.gating.delta.mean(0).tolist(), found.states.norm.mean(0).tolist()
    rows = range(len(found.labels))
    for i in rows if len(rows) <= _ROWS else rows[-_ROWS:]:
        guesses = zip(found.predictions.guesses[i][:3], next_p[i], strict=False)
        table.add_row(
            cell(f"{found.start + i:,}", "dim"),
            cell(short(found.labels[i], 16)),
            cell("–" if losses[i] != losses[i] else f"{losses[i]:.2f}"),
            cell(f"{delta[i]:.3g}"),
            cell(f"{norm[i]:.3g}"),
            cell("  ".join(f"{short(g, 12)} {p:.2f}" for g, p in guesses)),
        )
    console.print(table)
    if len(rows) > _ROWS:
        console.print(cell(f"the last {_ROWS} of {len(rows):,} tokens; the page and --json have all", "dim"))


def _notice(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    typer.echo(f"note: {_one_line(message)}", err=True)


def _one_line(message: object) -> str:
    return " ".join(str(message).split()).encode("utf-8", "backslashreplace").decode("utf-8")


def main() -> None:
    """Run the command line. Exit status 2 and one line on standard error for whatever we refuse."""
    warnings.showwarning = _notice
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows no UTF-8 shows what it can
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app()
    except MambascopeError as error:
        typer.echo(f"mambascope: {_one_line(error)}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader (head, less) has gone
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
