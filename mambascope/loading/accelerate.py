"""`accelerate`: our convolution and scan inside a transformers model, which stays the object that it is.

Only the class of each mixer changes, to a subclass made here whose ``forward`` is ours. Parameters, hooks, the config
and everything around the mixers stay untouched, and `Acceleration` puts the class back. transformers is not imported
here; whoever has a transformers model has done so.
"""

import importlib
import sys
from types import TracebackType
from typing import Any, cast

from torch import nn

from mambascope.errors import BackendError, InputError
from mambascope.loading.mixer_forward import mixer_forward
from mambascope.ops import BACKENDS, Backend, resolve_backend

__all__ = ["Acceleration", "accelerate", "restore"]

_MIXERS = {
    "transformers.models.mamba.modeling_mamba": ("MambaPreTrainedModel", "MambaMixer"),
    "transformers.models.falcon_mamba.modeling_falcon_mamba": ("FalconMambaPreTrainedModel", "FalconMambaMixer"),
}
_MARK = "_mambascope_original"
_CACHE_METHODS = (
    "get_conv_state",
    "get_recurrent_state",
    "update_conv_state",
    "update_recurrent_state",
    "is_recording_past",
)
_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj", "act", "layer_idx", "config")
_classes: dict[tuple[type, str], type] = {}


def accelerate(model: nn.Module, *, backend: Backend = "auto") -> "Acceleration":
    """Give a transformers Mamba or Falcon-Mamba model our convolution and scan in place of its own.

    The logits, gradients and generated tokens stay the model's (float32: within 2e-5; lower types: within their
    rounding). Where transformers' own code is wrong, ours is not: a cached continuation of several tokens starts from
    the cached state, and padding, left or right, leaves state and logits of the real tokens as without it.

    >>> undo = accelerate(model)     # model.generate(...), training, everything as before
    >>> undo()                       # the original again
    >>> with accelerate(model): ...  # the same, for a while

    Args:
        model: ``MambaForCausalLM``, ``MambaModel``, ``FalconMambaForCausalLM``, ``FalconMambaModel`` or a subclass,
            on one device. A model around one (PEFT, DataParallel, torch.compile) is accelerated through the one inside.
        backend: see `mambascope.ops.resolve_backend`.

    Returns:
        `Acceleration`; calling it, or leaving its ``with`` block, restores the model.

    Raises:
        InputError: something else than such a model, one accelerated already, or one whose mixers were changed or are
            moved about by the accelerate library; the message says which.
        BackendError: an explicit backend that cannot run, or a transformers release that keeps its caches otherwise.
    """
    mixers = _mixers_of(model)
    weight, states = mixers[0].conv1d.weight, mixers[0].A_log.shape[1]
    resolve_backend(backend, weight.device, weight.dtype, d_state=states, d_conv=weight.shape[-1])
    for mixer in mixers:
        mixer.__class__ = _accelerated(type(mixer), backend)
    return Acceleration(mixers)


def restore(model: nn.Module) -> None:
    """Put back transformers' own mixers wherever they are in ``model``: for copies, which have no `Acceleration`."""
    for module in model.modules():
        original = getattr(type(module), _MARK, None)
        if original is not None:
            module.__class__ = original


class Acceleration:
    """What `accelerate` has done to a model: call it, or leave its ``with`` block, to undo it. Once undone, it is."""

    def __init__(self, mixers: list[nn.Module]) -> None:
        self._mixers = mixers

    @property
    def active(self) -> bool:
        """Whether the model runs on our operators now."""
        return any(hasattr(type(mixer), _MARK) for mixer in self._mixers)

    def __call__(self) -> None:
        """Restore the model exactly as it was."""
        for mixer in self._mixers:
            restore(mixer)

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self()

    def __repr__(self) -> str:
        return f"Acceleration({len(self._mixers)} mixers, {'active' if self.active else 'undone'})"


def _accelerated(original: type, backend: Backend) -> type:
    """The subclass of transformers' mixer class that runs on our operators; the same one every time."""
    found = _classes.get((original, backend))
    if found is None:
        body = {
            "forward": mixer_forward(backend),
            "extra_repr": lambda self: f"accelerated by mambascope, backend={backend!r}",
            _MARK: original,
            "__module__": __name__,
            "__qualname__": f"{original.__name__}_{backend}",  # by which pickle finds it again, below
            "__doc__": original.__doc__,
        }
        found = _classes[original, backend] = type(original.__name__, (original,), body)
    return found


def __getattr__(name: str) -> Any:
    """Classes made by `_accelerated`, for pickle (``torch.save`` of a whole accelerated model)."""
    mixer_name, _, backend = name.partition("_")
    for home, (_, known) in _MIXERS.items():
        if mixer_name == known and backend in BACKENDS:
            return _accelerated(getattr(importlib.import_module(home), known), cast(Backend, backend))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- what can be accelerated ---


def _mixers_of(model: Any) -> list[Any]:
    """The mixers of a model that can be accelerated, else `InputError`."""
    kind = type(model).__name__
    family = _family(model)
    if family is None:
        raise InputError(f"accelerate takes transformers' Mamba-1 models, got {kind}{_why_not(model)}")
    home, mixer_name = family, _MIXERS[family][1]
    mixer_class = getattr(sys.modules[home], mixer_name)
    mixers = [m for m in model.modules() if isinstance(m, mixer_class)]
    if not mixers:
        raise InputError(f"{kind} holds no {mixer_name}: there is nothing to accelerate")
    for mixer in mixers:
        _check_mixer(mixer, mixer_class)
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise InputError(
            f"this {kind} is moved between devices by the accelerate library (device_map, offloading), which our "
            "operators do not follow; load it onto one device"
        )
    _check_release(mixers[0])
    return mixers


def _family(model: Any) -> str | None:
    for home, (base, _) in _MIXERS.items():
        module = sys.modules.get(home)  # a model of a class whose module is not there cannot exist
        if module is not None and isinstance(model, getattr(module, base)):
            return home
    return None


def _why_not(model: Any) -> str:
    kind = type(model)
    if not isinstance(model, nn.Module):
        return "; give it the model itself"
    if kind.__module__.startswith("mambascope."):
        return ", which runs on these operators already"
    if any(_family(module) for module in model.modules()):
        return ", which has one inside: give it that one (model.module, model._orig_mod, model.get_base_model(), …)"
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    named = f" (model_type {architecture!r})" if architecture else ""
    return f"{named}: MambaForCausalLM, MambaModel, FalconMambaForCausalLM and FalconMambaModel are known"


def _check_mixer(mixer: Any, expected: type) -> None:
    name = f"mixer {getattr(mixer, 'layer_idx', '?')}"
    if hasattr(type(mixer), _MARK):
        raise InputError(
            "this model is accelerated already; call what accelerate returned, or "
            "mambascope.loading.accelerate.restore(model), before accelerating it again"
        )
    if type(mixer) is not expected:
        raise InputError(
            f"{name} is a {type(mixer).__qualname__}, not transformers' {expected.__name__} itself: its own forward "
            "would be lost"
        )
    if "forward" in vars(mixer):
        raise InputError(f"{name} has a forward of its own, set on the instance: it would be passed over")


def _check_release(mixer: Any) -> None:
    """`BackendError` if the installed transformers keeps its caches or mixers in a way that we do not know."""
    cache = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    missing = [f"Cache.{name}" for name in _CACHE_METHODS if not hasattr(cache, name)]
    missing += [f"{type(mixer).__name__}.{name}" for name in _PARTS if not hasattr(mixer, name)]
    if missing:
        version = getattr(sys.modules.get("transformers"), "__version__", "?")
        raise BackendError(
            f"accelerate does not know the Mamba of transformers {version}: {', '.join(missing)} is missing; "
            "it was tested with 5.23"
        )
