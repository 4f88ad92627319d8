"""Hooks by site, and caching: TransformerLens' methods, strict where they would be silent."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor
from transformer_lens import HookedRootModule

from mambascope.errors import HookError, InputError
from mambascope.hooks.cache import CacheRecorder, MambaCache, select_names
from mambascope.hooks.interventions.base import Intervention, expand, missed
from mambascope.hooks.model_protocol import Scope
from mambascope.hooks.occupancy import Occupancy
from mambascope.hooks.points import hook_names, resolve_name
from mambascope.hooks.sites import Site, SitePoint, parse_site
from mambascope.hooks.transformer_lens_bridge import caching_hooks

if TYPE_CHECKING:
    from mambascope.model.graphs import Graphs

__all__ = ["HookMethods"]


class HookMethods(HookedRootModule):
    """The base of HookedMamba that knows hooks but not the model."""

    occupancy: Occupancy
    graphs: "Graphs"
    _at_level: dict[int, list[SitePoint]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._at_level = {}  # the points that a context's hooks sit at

    def add_hook(  # type: ignore[override]
        self,
        name: str | Site | Callable[[str], bool],
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook at a site, or at every hook point whose name a function accepts (one at least)."""
        self.occupancy.check()
        for point, index in self._points_for(name):
            self.check_hooks_to_add(point, str(point.name), hook, dir, is_permanent, prepend)
            if level is not None:
                self._at_level.setdefault(level, []).append(point)
            placed = point.add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend, index=index)
            self.graphs.watch.note(point, placed.hook.id)

    def _points_for(self, name: str | Site | Callable[[str], bool]) -> list[tuple[SitePoint, Any]]:
        if isinstance(name, (str, Site)):
            bare, index = parse_site(name) if isinstance(name, str) else (name.name, name.index)
            return [(cast(SitePoint, self.hook_dict[resolve_name(bare, self.hook_dict)]), index)]  # type: ignore[arg-type]
        if not callable(name):
            raise HookError(f"a site is a string, ms.at(…) or a function of names, got {type(name).__name__}")
        found = [(cast(SitePoint, point), None) for key, point in self.hook_dict.items() if name(key)]
        if not found:
            raise HookError("the function given as a site accepts no hook point, so its hook would never fire")
        return found

    def setup(self) -> None:
        """As in TransformerLens; ``hook_dict`` lists the points in the order in which they fire."""
        super().setup()
        order = {name: i for i, name in enumerate(hook_names(cast(Any, self).cfg.layers))}
        self.hook_dict = dict(sorted(self.hook_dict.items(), key=lambda item: order.get(item[0], len(order))))

    def list_hooks(self, name_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; short names are understood, and a name that matches nothing is an error."""
        if name_filter is not None:
            name_filter = select_names(name_filter, list(self.hook_dict))
        return super().list_hooks(name_filter, *args, **kwargs)

    def get_caching_hooks(  # type: ignore[override]
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """As in TransformerLens; see :func:`mambascope.hooks.transformer_lens_bridge.caching_hooks`."""
        return caching_hooks(self, names_filter, incl_bwd, device, remove_batch_dim, cache, pos_slice)

    def add_caching_hooks(  # type: ignore[override]
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """As in TransformerLens: hooks that stay until ``reset_hooks`` and fill the dict that is returned."""
        cache, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for hooks, dir in ((forward, "fwd"), (backward, "bwd")):
            for name, hook in hooks:
                self.add_hook(name, hook, dir)  # type: ignore[arg-type]
        return cache

    def _enable_hook(self, name: Any, hook: Callable[..., Any], dir: Literal["fwd", "bwd"]) -> None:
        self.add_hook(name, hook, dir=dir, level=self.context_level)

    @contextmanager
    def hooks(  # type: ignore[override]
        self,
        fwd_hooks: list[Any] = [],  # noqa: B006  (TransformerLens' signature)
        bwd_hooks: list[Any] = [],  # noqa: B006
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["HookMethods"]:
        """Hooks ``[(site, fn), …]`` for as long as the context lasts; interventions may stand among them."""
        pairs = expand(fwd_hooks, cast(Any, self))
        with self.occupancy.hooking() if pairs or bwd_hooks else nullcontext():
            self.context_level += 1
            try:
                for site, hook in pairs:
                    self._enable_hook(site, hook, "fwd")
                for site, hook in bwd_hooks:
                    self._enable_hook(site, hook, "bwd")
                yield self
            finally:
                self._leave(reset_hooks_end, clear_contexts)

    def __copy__(self) -> Any:
        """A second model of the same modules, as torch's are: weights, hooks and edits of one are the other's."""
        twin = type(self).__new__(type(self))
        twin.__setstate__(dict(self.__dict__))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A model of its own; what hooks it now hooks the copy as well, until its ``reset_hooks()``."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """HookError if hooks are in force: a function among them could not be written."""
        live = next((name for name, point in self.hook_dict.items() if cast(SitePoint, point).live), None)
        if live is not None:
            raise HookError(
                f"a model with hooks in force (at {live}) cannot be pickled or saved whole: leave the context that put "
                "them there, or call reset_hooks(including_permanent=True); ms.loading.save_model writes the weights"
            )
        return super().__reduce_ex__(protocol)

    def _leave(self, reset: bool, clear_contexts: bool) -> None:
        """End a context: its hooks go, from the points that have some (there are 28 points a block)."""
        for point in self._at_level.pop(self.context_level, []) if reset else []:
            point.remove_hooks("both", including_permanent=False, level=self.context_level)
        if reset:
            if clear_contexts:
                self.clear_contexts()
            self.is_caching = False
        self.context_level -= 1

    @contextmanager
    def intervene(self, interventions: "Intervention | list[Any]") -> Iterator["HookMethods"]:
        """Interventions (``ms.interventions``) in force for as long as the context lasts.

        They reach every call inside: the model itself, ``generate``, ``step``, ``run_with_cache``. One that no call
        reached, although there was a call, is a HookError at the end.
        """
        one = isinstance(interventions, Intervention)
        pairs = expand([interventions] if one else interventions, cast(Any, self))  # type: ignore[arg-type]
        clock = cast(Any, self)._clock
        before, clock.ran = clock.ran, False
        try:
            with self.hooks(fwd_hooks=pairs):
                yield self
            _check_reached(pairs if clock.ran else [])
        finally:
            clock.ran = clock.ran or before

    def run_with(self, input: Any, interventions: "Intervention | list[Any]", **options: Any) -> Any:
        """``model(input, **options)`` with interventions in force; see :meth:`intervene`.

        ``model.edits_done()`` and ``model.explain_path()`` tell what each of them did.
        """
        with self.intervene(interventions):
            return self(input, **options)

    def run_with_hooks(  # type: ignore[override]
        self,
        *model_args: Any,
        fwd_hooks: list[Any] = [],  # noqa: B006  (TransformerLens' signature)
        bwd_hooks: list[Any] = [],  # noqa: B006
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """One forward pass with hooks ``[(site, fn), …]``; they are gone afterwards, also after an error.

        Backward hooks stay attached to the graph of this call: they fire when its output is differentiated.
        A site named in words that the run does not reach is a HookError.
        """
        fwd_hooks = expand(fwd_hooks, cast(Any, self))
        named = [
            (site, self._points_for(site)[0][0])
            for site, _ in (*fwd_hooks, *bwd_hooks)
            if isinstance(site, (str, Site))
        ]
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            for _, point in named:
                point.reached = False
            out = self(*model_args, **model_kwargs)
        for site, point in named:
            if not point.reached:
                raise HookError(
                    f"{site} was never reached, so its hook did nothing: the run left it out (start_at_layer, "
                    "stop_at_layer), or no gradient flows there (torch.no_grad(), frozen weights)"
                )
        _check_reached(fwd_hooks)
        return out

    def run_with_cache(  # type: ignore[override]
        self,
        *model_args: Any,
        names_filter: Any = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        return_cache_object: bool = True,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and return ``(output, cache)``; see :class:`mambascope.hooks.cache.MambaCache`.

        Without ``names_filter`` everything is readable while little is stored: each block's input and its
        state every 64 tokens; the rest is computed on first read. With a filter (a name, a list, a function)
        those activations are stored. ``incl_bwd`` differentiates the output, which must be a scalar
        (``return_type="loss"``), and stores everything with gradients as ``name + "_grad"``.
        """
        names = select_names(names_filter, list(self.hook_dict))
        recorder = CacheRecorder(
            cast(Scope, self),
            names,
            everything=names_filter is None,
            eager=incl_bwd or pos_slice is not None,
            spelled_out=not callable(names_filter),
        )
        backward: list[Any] = [(n, recorder.take_gradient) for n in recorder.gradient_names()] if incl_bwd else []
        with self.hooks(bwd_hooks=backward, reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts):
            out = self(*model_args, recorder=recorder, **model_kwargs)
            if incl_bwd:
                result = out[0] if isinstance(out, tuple) else out
                if not isinstance(result, Tensor) or result.numel() != 1:
                    raise InputError("incl_bwd needs a scalar output; call with return_type='loss'")
                if not result.requires_grad:
                    raise InputError(
                        "incl_bwd: the output has no gradient; leave torch.no_grad(), or let a weight (or a hook's "
                        "value) require one"
                    )
                result.backward()
        cache = MambaCache(recorder.finish(), cast(Scope, self))
        if pos_slice is not None:
            cache = cache.at_positions(pos_slice, lazy=names_filter is not None)
        if device is not None:
            cache = cache.to(device)
        if remove_batch_dim:
            cache = cache.remove_batch_dim()
        return out, cache if return_cache_object else dict(cache.items())


def _check_reached(pairs: list[Any]) -> None:
    """HookError for an intervention that did not come to what it was to edit."""
    for bound, what in missed(pairs):
        raise HookError(
            f"{bound.made_by} was never reached at {what}, so it did nothing there: the position lies outside of what "
            "was read, or the run left the site out (start_at_layer, stop_at_layer)"
        )
