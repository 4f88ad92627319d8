"""Tokens as people read them: labels for axes, tables and pages, with everything invisible made visible."""

import unicodedata

from mambascope.hooks.tokens import token_labels

__all__ = ["short", "token_labels", "visible"]

_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidi marks among them), surrogates, separators


def visible(text: str, spaces: bool = True) -> str:
    """The text with control, format and bidirectional characters spelled out, and (``spaces``) blanks as ``·``."""
    out = []
    for c in text:
        if c in _SIGNS:
            out.append(_SIGNS[c])
        elif c < " ":
            out.append(chr(0x2400 + ord(c)))
        elif c == " " and spaces:
            out.append("·")
        elif unicodedata.category(c) in _HIDDEN:
            out.append(f"\\u{ord(c):04x}")
        else:
            out.append(c)
    return "".join(out)


def short(text: str, width: int = 14) -> str:
    """A visible label of at most ``width`` characters."""
    shown = visible(text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"
