"""From what a user passes in (text, ids, a mask) to checked tokens and padding."""

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.hooks.sites import Padding, padding_of

if TYPE_CHECKING:
    from mambascope.model.language_model import HookedMamba

__all__ = ["Entry", "Prepared", "check_ids", "entry_of", "layers_of", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """Checked input: tokens ``B L`` on the model's device, padding or None, and whether a BOS was prepended.

    ``bos`` is None where ids were given: they are taken as they are.
    """

    tokens: Tensor
    padding: Padding | None
    bos: bool | None


# GPU tensors whose ids were found good, by identity, with their versions and the vocabulary: looking at the values
# waits for the device, and the same text often comes again. Tensors made in inference mode have no version.
_good: OrderedDict[int, tuple[weakref.ref[Tensor], int, int]] = OrderedDict()
_MOST_GOOD = 64


def _known(tokens: Tensor, n_tokens: int) -> bool:
    found = _good.get(id(tokens))
    return found is not None and found[0]() is tokens and found[1] == tokens._version and found[2] <= n_tokens


def check_ids(tokens: Tensor, n_tokens: int, what: str = "tokens") -> None:
    """InputError unless ``tokens`` is a non-empty ``B L`` tensor of integer ids in the vocabulary."""
    if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise InputError(f"{what} must be integer ids (torch.long), got {tokens.dtype}")
    if tokens.ndim != 2:
        raise InputError(f"{what} must have shape (batch, length), got {tuple(tokens.shape)}")
    if tokens.numel() == 0:
        raise InputError(f"{what} is empty (shape {tuple(tokens.shape)}); give at least one token")
    if torch.compiler.is_compiling() or tokens.is_meta or (tokens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # values cannot be looked at there
    keeps = tokens.is_cuda and not tokens.is_inference()
    if keeps and _known(tokens, n_tokens):
        return
    low, high = (int(v) for v in torch.stack(torch.aminmax(tokens)).tolist())
    if low < 0 or high >= n_tokens:
        bad = low if low < 0 else high
        row, column = (int(v) for v in (tokens == bad).nonzero()[0])
        raise InputError(
            f"{what}[{row}, {column}] is {bad}, outside the vocabulary of {n_tokens} tokens (0…{n_tokens - 1})"
        )
    if keeps:
        _good[id(tokens)] = weakref.ref(tokens), tokens._version, n_tokens
        if len(_good) > _MOST_GOOD:
            _good.popitem(last=False)


def prepare(
    model: "HookedMamba", value: Any, prepend_bos: bool | None = None, attention_mask: Tensor | None = None
) -> Prepared:
    """Text, a list of texts or ids -> tokens ``B L``; ragged texts are padded on the right."""
    if isinstance(value, (bytes, bytearray)):
        raise InputError("text is str, got bytes: decode them first")
    if isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value):  # type: ignore[attr-defined]
        raise InputError("torch.vmap over a model: it takes a batch itself, so give ids (B, L)")
    if isinstance(value, str) or (isinstance(value, Sequence) and value and all(isinstance(v, str) for v in value)):
        if attention_mask is not None:
            raise InputError("attention_mask goes with token ids; for text the padding is known")
        texts = [value] if isinstance(value, str) else list(value)
        rows, bos = model.encode_texts(texts, prepend_bos)
        width = max(len(row) for row in rows)
        tokens = torch.tensor([row + [model.pad_token_id] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return Prepared(tokens, padding_of(mask, (len(rows), width), model.device), bos)
    if isinstance(value, Sequence) and not len(value):
        raise InputError("the input is empty; give a text, a list of texts, or token ids")
    if isinstance(value, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        raise InputError(f"give text, a list of texts, or a LongTensor of ids, got {type(value).__name__}")
    if prepend_bos:
        raise InputError(
            "prepend_bos=True goes with text; token ids are taken as they are, so put the id in front yourself"
        )
    tokens = value[None] if value.ndim == 1 else value
    _check_place(tokens, model)
    check_ids(tokens, model.cfg.n_tokens)  # ids on the host cost no wait for the device
    tokens = tokens.to(model.device, torch.long, non_blocking=True)
    if attention_mask is not None and attention_mask.ndim == 1:
        attention_mask = attention_mask[None]
    shape = (tokens.shape[0], tokens.shape[1])
    padding = padding_of(attention_mask, shape, model.device) if attention_mask is not None else None
    return Prepared(tokens, padding, None)


@dataclass(frozen=True)
class Entry:
    """Where a forward pass begins: tokens, or a residual stream."""

    tokens: Tensor | None
    resid: Any
    padding: Padding | None
    bos: bool | None

    @property
    def batch(self) -> int:
        return (self.tokens if self.tokens is not None else self.resid).shape[0]

    @property
    def length(self) -> int:
        return (self.tokens if self.tokens is not None else self.resid).shape[1]


def _check_place(value: Tensor, model: "HookedMamba") -> None:
    if value.is_meta and model.device.type != "meta":
        raise InputError(f"the input lies on torch's meta device and holds no values; the model is on {model.device}")


def entry_of(
    model: "HookedMamba", value: Any, prepend_bos: bool | None, mask: Tensor | None, start: int | None
) -> Entry:
    """Where a pass begins: checked tokens, or with start_at_layer a checked residual stream."""
    if start is None:
        prepared: Prepared = prepare(model, value, prepend_bos, mask)
        return Entry(prepared.tokens, None, prepared.padding, prepared.bos)
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[-1] != model.cfg.d_model:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"with start_at_layer the input is a residual stream (B, L, {model.cfg.d_model}), got {got}")
    _check_place(value, model)
    if not value.is_floating_point() or value.shape[1] == 0:
        raise InputError(
            f"the residual stream must be a non-empty float tensor, got {value.dtype}, {tuple(value.shape)}"
        )
    value = value.to(model.device)
    padding = None if mask is None else padding_of(mask, (value.shape[0], value.shape[1]), model.device)
    return Entry(None, value, padding, None)


def layers_of(n: int, start: int | None, stop: int | None, return_state: bool) -> tuple[int, int]:
    """The blocks [first, last) of ``n`` that start_at_layer and stop_at_layer mean; InputError where there are none."""
    for name, value in (("start_at_layer", start), ("stop_at_layer", stop)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not -n <= value <= n:
            raise InputError(f"{name}={value!r} is outside the model's {n} blocks ({-n}…{n})")
    if start is not None and start == n:
        raise InputError(f"start_at_layer={start}: the last block is {n - 1}")
    first = 0 if start is None else start % n
    last = n if stop is None or stop == n else stop % n
    if last < first:
        raise InputError(f"stop_at_layer={stop} lies before start_at_layer={start}")
    if return_state and (first, last) != (0, n):
        raise InputError("return_state needs the whole model: leave start_at_layer and stop_at_layer out")
    return first, last
