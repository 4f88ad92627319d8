"""A model without weights: built in no time and no memory, to be filled by the loader."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mambascope.config import MambaConfig
from mambascope.model import HookedMamba
from mambascope.ops import Backend

__all__ = ["hollow_model"]

_FILLS = {nn.init.normal_, nn.init.uniform_, nn.init.constant_, nn.init.kaiming_uniform_}
_FILLS |= {torch.Tensor.copy_, torch.Tensor.div_, torch.Tensor.mul_}


class _Hollow(TorchFunctionMode):
    """Parameters without memory, and no random initialisation.

    ``torch.device("meta")`` would do, but its random numbers and ranges are decompositions whose import takes 2 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FILLS:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        if func is torch.empty:
            return torch.empty(*args, **(kwargs | {"device": "meta"}))
        if func is torch.rand:
            return torch.zeros(*args, **kwargs)
        return func(*args, **kwargs)


def hollow_model(cfg: MambaConfig, tokenizer: Any, backend: Backend) -> HookedMamba:
    """A ``HookedMamba`` whose large parameters are on the meta device; the random number generators do not move."""
    with _Hollow():
        return HookedMamba(cfg, tokenizer, backend=backend)
