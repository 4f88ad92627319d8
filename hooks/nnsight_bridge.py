"""A model inside nnsight: ``.trace``, ``.generate``, invokes, edits and gradients, by our names of hook points."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mambascope.errors import HookError, InputError
from mambascope.hooks.positions import Site
from mambascope.hooks.sites import SitePoint

with contextlib.suppress(ImportError):
    import beartype  # noqa: F401  (nnsight gives every object a .save, after which beartype cannot be imported)

from nnsight.intervention.envoy import Envoy, traceable
from nnsight.intervention.interleaver import OutOfOrderError

from mambascope.hooks.nnsight_points import (
    ConvEnvoy,
    Desk,
    LeafEnvoy,
    PointEnvoy,
    RowBatcher,
    TracedSite,
    TraceInterleaver,
)

__all__ = ["TracedMamba", "wrap"]

_ORDER = (
    "ask for hook points in the order in which they fire (mambascope.HOOK_POINTS; states in order of their position), "
    "and only for such as this run reaches"
)


def wrap(model: Any, padding_side: str = "right") -> "TracedMamba":
    """The model in nnsight's hands: every hook point and every position of it can be read and set inside a trace.

        lm = ms.wrap(model)
        with lm.trace("The river ran"):
            delta = lm.hooks["blocks.3.mixer.hook_delta"].output.save()   # B L D
            lm.site("blocks.3.mixer.hook_h[5]").output[:] = 0             # the state after token 5, B D N
            logits = lm.output.save()

    Prompts are text, lists of texts, or ids. Several ``tracer.invoke(prompt)`` make one batch, padded on
    ``padding_side``; positions in a site count the prompt's own tokens. Cost: that of the same hooks; what is not
    asked for is computed as in a plain run. The model itself stays what it was.

    Raises
    ------
    InputError: no mambascope model, or a padding side that is neither "left" nor "right".
    """
    return TracedMamba(model, padding_side)


class TracedMamba(Envoy):
    """nnsight's root envoy of a :class:`~mambascope.HookedMamba`; made by :func:`wrap`."""

    _batcher_class = RowBatcher
    _module: Any

    def __init__(self, model: Any, padding_side: str = "right") -> None:
        if not isinstance(model, nn.Module) or not isinstance(getattr(model, "hook_embed", None), SitePoint):
            raise InputError(f"wrap takes a mambascope model, got {type(model).__name__}; ms.load(…) gives one")
        if padding_side not in ("left", "right"):
            raise InputError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        interleaver = TraceInterleaver()
        self._desk = interleaver.desk = Desk(model, interleaver)
        self._padding_side = padding_side
        super().__init__(
            model,
            path="model",
            interleaver=interleaver,
            envoys={SitePoint: PointEnvoy, nn.Conv1d: ConvEnvoy, nn.Linear: LeafEnvoy},
        )

    # ---- hook points

    @property
    def hooks(self) -> Mapping[str, TracedSite]:
        """Every hook point by its name; short names are understood."""
        return _Hooks(self._desk)

    def site(self, site: str | Site) -> TracedSite:
        """A hook point at positions: ``lm.site("blocks.3.mixer.hook_h[5]").output``, or ``ms.at(name, per row)``.

        Positions count each row's real tokens; in ``generate`` they are absolute. A site has the shape that a hook
        gets: an integer drops the position axis, a slice keeps it.
        """
        return self._desk.site(site)

    # ---- running

    @traceable
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``; as a ``with`` block a trace of it, in which a point fires once a step.

        ``for step in tracer.iter[:]`` goes along the steps; the first is the prompt, each other one new token.
        ``tracer.result`` has the ids: prompt and new tokens, one row a prompt.
        """
        return self._module.generate(*args, **kwargs)

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """As in nnsight; the hook points' part is set up before and gone afterwards, whatever happens."""
        self._desk.open()
        try:
            return super().interleave(fn, *args, **kwargs)
        except OutOfOrderError as error:
            error.add_note(_ORDER)
            raise
        finally:
            self._desk.close()

    # ---- prompts

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        value = inputs[0] if inputs else kwargs.get("input", kwargs.get("prompt"))
        if value is None:
            return 0
        if isinstance(value, Tensor):
            return 1 if value.ndim < 2 else value.shape[0]
        if isinstance(value, (list, tuple)) and value and not isinstance(value[0], int):
            return len(value)
        return 1

    def _batch(self, invokes: list[Any], fn: Any) -> tuple[Any, dict[str, Any]]:
        if not invokes:
            return (), {}
        if len(invokes) == 1:
            inputs, kwargs = invokes[0]
            value = inputs[0] if inputs else kwargs.get("input", kwargs.get("prompt"))
            text = isinstance(value, str) or _is_texts(value)
            if not text or (self._padding_side == "right" and isinstance(fn, str)):
                return inputs, kwargs  # the model takes it as it is; generate gives ids only for ids
        rows: list[list[int]] = []
        shared: dict[str, Any] = {}
        for i, (inputs, kwargs) in enumerate(invokes):
            if len(inputs) > 1:
                raise InputError(f"prompt {i}: give one input to an invoke, and everything else by name")
            own = dict(kwargs)
            mask, bos = own.pop("attention_mask", None), own.pop("prepend_bos", None)
            value = inputs[0] if inputs else own.pop("input", own.pop("prompt", None))
            rows += self._rows(value, mask, bos, i)
            for name, option in own.items():
                if name == "state" or (name in shared and shared[name] is not option and shared[name] != option):
                    raise InputError(f"{name}= cannot differ between the prompts of one batch; trace them one by one")
                shared[name] = option
        tokens, mask = self._padded(rows)
        return (tokens,), {**({} if mask is None else {"attention_mask": mask}), **shared}

    def _rows(self, value: Any, mask: Any, bos: bool | None, i: int) -> list[list[int]]:
        """The real tokens of each row of one prompt."""
        if isinstance(value, str) or _is_texts(value):
            if mask is not None:
                raise InputError(f"prompt {i}: attention_mask goes with token ids; for text the padding is known")
            return self._module.encode_texts([value] if isinstance(value, str) else list(value), bos)[0]
        ids = torch.as_tensor(value) if isinstance(value, (list, tuple, Tensor)) else None
        if ids is None or ids.is_floating_point() or ids.ndim not in (1, 2) or ids.numel() == 0:
            got = f"{type(value).__name__}" if ids is None else f"{ids.dtype} {tuple(ids.shape)}"
            raise InputError(f"prompt {i}: several prompts in a batch are text or ids (B L or L), got {got}")
        if bos:
            raise InputError(f"prompt {i}: prepend_bos=True goes with text; put the id in front yourself")
        ids = ids[None] if ids.ndim == 1 else ids
        if mask is None:
            return ids.tolist()
        keep = torch.as_tensor(mask).reshape(ids.shape).bool()
        return [row[on].tolist() for row, on in zip(ids, keep.to(ids.device), strict=True)]

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        width = max(map(len, rows))
        left = self._padding_side == "left"
        tokens = torch.full((len(rows), width), self._module.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for b, row in enumerate(rows):
            where = slice(width - len(row), None) if left else slice(0, len(row))
            tokens[b, where], mask[b, where] = torch.tensor(row), 1
        return tokens, None if bool(mask.all()) else mask


class _Hooks(Mapping[str, TracedSite]):
    """The hook points as a mapping; sites with positions are :meth:`TracedMamba.site`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def __getitem__(self, name: str) -> TracedSite:
        site = self._desk.site(name)
        if site.index is not None:
            raise HookError(f"hooks[…] takes names of hook points; write lm.site({name!r}) for positions")
        return site

    def __iter__(self) -> Iterator[str]:
        return iter(self._desk.model.hook_dict)

    def __len__(self) -> int:
        return len(self._desk.model.hook_dict)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, str) for v in value)
