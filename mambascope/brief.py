"""Results that show themselves in a few lines: tensors and tables by their shape, not by their numbers."""

import dataclasses
from typing import Any

__all__ = ["Brief"]

_LONG = 60


class Brief:
    """Mixed into result dataclasses (``@dataclass(repr=False)``): a ``repr`` that fits a notebook's cell."""

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.repr and not field.name.startswith("_"):
                shown.append(f"{field.name}={_brief(getattr(self, field.name))}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind}[{' '.join(map(str, shape))}]" if len(shape) else f"{value.item():.6g}"
    if shape is not None:
        return f"<{type(value).__name__} {' x '.join(map(str, shape))}>"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = repr(value)
    if len(text) <= _LONG:
        return text
    if isinstance(value, (tuple, list, dict)):
        return f"<{len(value)} in a {type(value).__name__}>"
    return text if "\n" not in text and len(text) < 4 * _LONG else f"<{type(value).__name__}>"
