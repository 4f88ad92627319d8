"""One token at a time on a GPU: fused kernels, recorded as CUDA graphs, the states where the graphs find them.

A decoder serves a few rows. Its memory holds the states of whoever uses it now (a call of ``step``, or a running
generation); whoever used it before gets a copy of its own, and comes back with that.
"""

import weakref
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mambascope.model import recording
from mambascope.model.block import Block
from mambascope.model.sampling import Sampler, draw
from mambascope.model.state import MambaState, State

if TYPE_CHECKING:
    from mambascope.model.language_model import HookedMamba
    from mambascope.ops import step as kernels

__all__ = ["LOOK_AHEAD", "Decoder", "Generation", "fill", "why_no_decoder"]

LOOK_AHEAD = 32  # the width of what a decoder can tell
"""Tokens that a generation computes before it looks whether all rows have met a stop token."""

_UNROLLED = 8  # tokens of the longer recording, where the device chooses them
_MOST_SAMPLERS = 4  # ways of choosing that stay recorded


class Decoder:
    """Buffers and recordings for ``batch`` rows of one model."""

    def __init__(self, model: "HookedMamba", batch: int) -> None:
        from mambascope.ops import step as kernels

        self._kernels = kernels
        cfg, device = model.cfg, model.device
        layers, head = weights_of(model)
        states = model.initial_state(batch).layers
        self.ssm = torch.stack([s.ssm for s in states])  # n_layers B D N
        self.conv = torch.stack([s.conv for s in states])  # n_layers B D K-1
        residual = cast(Block, model.blocks[0]).residual_dtype
        self.resid = torch.zeros(batch, cfg.d_model, dtype=residual, device=device)
        self.logits = torch.zeros(batch, cfg.d_vocab, dtype=model.dtype, device=device)
        self.choice = kernels.Choice.of(head, batch, LOOK_AHEAD)
        self._scratch = kernels.Scratch.of(layers[0], batch)
        self._sound = torch.ones((), dtype=torch.bool, device=device)  # whether all logits were a distribution
        self._generator = torch.Generator(device)  # recordings draw from this one, put where the caller's stands
        self._recorded: OrderedDict[Sampler | None, dict[int, recording.Recorded] | str] = OrderedDict()
        self.owner: weakref.ref[Generation] | None = None

    def prepare(self, model: "HookedMamba", sampler: Sampler | None) -> None:
        """Record what `run` will replay, if that has not been done; without a sampler logits are left behind."""
        sampler = _alike(sampler)
        if sampler in self._recorded:
            self._recorded.move_to_end(sampler)
            return
        choice = self.choice
        memory = (self.ssm, self.conv, self.resid, choice.done, choice.ids, choice.count, self._sound)
        kept = [t.clone() for t in memory]
        self._launch(model, sampler, 1)  # compiles; what it does to the memory is undone
        for t, before in zip(memory, kept, strict=True):
            t.copy_(before)
        generator = None if sampler is None or sampler.greedy else self._generator
        made = {}
        for count in (1,) if sampler is None else (1, _UNROLLED):
            launch = partial(self._launch, model, sampler, count)
            made[count], _, _ = recording.record(launch, model.device, generator=generator)
        self._recorded[sampler] = made
        chosen = [s for s in self._recorded if s is not None and not s.greedy]
        for old in chosen[: len(chosen) - _MOST_SAMPLERS]:
            del self._recorded[old]

    def refuse(self, sampler: Sampler, why: str) -> None:
        """Tokens cannot be chosen so in a recording; its logits still serve."""
        self._recorded[_alike(sampler)] = why

    def chooses(self, sampler: Sampler) -> bool:
        """Whether `run` can choose tokens so."""
        return isinstance(self._recorded.get(_alike(sampler)), dict)

    def run(self, sampler: Sampler | None, tokens: int = 1) -> None:
        """``tokens`` tokens from ``resid``; chosen the one after the other, or with None ``logits`` are left behind."""
        found = self._recorded[_alike(sampler)]
        assert isinstance(found, dict)
        while tokens:
            count = _UNROLLED if _UNROLLED in found and tokens >= _UNROLLED else 1
            found[count].replay()
            tokens -= count

    def _launch(self, model: "HookedMamba", sampler: Sampler | None, count: int) -> None:
        layers, head = weights_of(model)
        greedy = sampler is not None and sampler.greedy
        for _ in range(count):
            for i, weights in enumerate(layers):
                self._kernels.layer(weights, self.resid, self.ssm[i], self.conv[i], self._scratch, i == 0)
            self._kernels.head(head, self.resid, self.logits, self.choice if greedy else None)
            if greedy:
                self._kernels.pick(head, self.resid, self.choice)
            elif sampler is not None:
                self._draw(model, sampler)

    def _draw(self, model: "HookedMamba", sampler: Sampler) -> None:
        """What `pick` does for the most likely tokens, for drawn ones."""
        choice = self.choice
        new, sound = draw(self.logits, sampler, self._generator)
        ids = torch.where(choice.done.bool(), choice.ids, new)
        choice.told.index_copy_(1, choice.count[:1], ids[:, None])
        choice.ids.copy_(ids)
        choice.done.logical_or_((ids[:, None] == choice.stops).any(1))
        choice.count.add_(1)
        self._sound.logical_and_(sound)
        self.enter(model, ids)

    def choose(self, tokens: int, sampler: Sampler, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """The next ids, ``B tokens``, for whom ``choice`` describes; of drawn ones also whether logits were sound."""
        if sampler.greedy:
            self.run(sampler, tokens)
            return self.choice.told[:, :tokens].clone(), None
        theirs = generator if generator is not None else _default_generator(self.resid.device)
        self._sound.fill_(True)
        self._generator.set_state(theirs.get_state())
        self.run(sampler, tokens)
        theirs.set_state(self._generator.get_state())
        return self.choice.told[:, :tokens].clone(), self._sound.clone()

    def step(self, model: "HookedMamba", ids: Tensor, state: State) -> tuple[Tensor, list[MambaState]]:
        """Logits ``B V`` after reading ids ``B`` from ``state``, and the states after them."""
        owner = None if self.owner is None else self.owner()
        if owner is not None:
            owner.state()
        self.owner = None
        self.load(state)
        self.enter(model, ids)
        self.run(None)
        return self.logits.clone(), self.layers()

    def load(self, state: State) -> None:
        """Take over the states of all layers."""
        fill(MambaState(self.ssm, self.conv), state.layers)

    def layers(self) -> list[MambaState]:
        """Copies of the states, one storage for all layers."""
        return [MambaState(*pair) for pair in zip(self.ssm.clone(), self.conv.clone(), strict=True)]

    def enter(self, model: "HookedMamba", ids: Tensor) -> None:
        """Put the embeddings of ids ``B`` into the residual stream."""
        self.resid.copy_(model.embed(ids))


class Generation:
    """A running generation: its rows' states, the ids it reads next, and which rows are done."""

    MOST_STOPS = 16  # that the kernels look for

    def __init__(self, state: State, ids: Tensor, done: Tensor, stops: list[int]) -> None:
        self._state, self.ids, self.done = state, ids, done
        room = self.MOST_STOPS
        self._stops = torch.tensor((stops + [-1] * room)[:room], device=ids.device)
        self._decoder: Decoder | None = None
        self._read = 0  # tokens since the state

    def state(self) -> State:
        """The states before ``ids`` are read, in memory of this generation's own."""
        decoder = self._decoder
        if decoder is not None and decoder.owner is not None and decoder.owner() is self:
            self._state = State(decoder.layers(), self._state.position + self._read, self._state.model_id)
            self._read, decoder.owner, self._decoder = 0, None, None
        return self._state

    def read(self, state: State, ids: Tensor, done: Tensor) -> None:
        """Somebody else read the last ids; this is where that led."""
        self._state, self.ids, self.done = state, ids, done

    def _come(self, model: "HookedMamba", decoder: Decoder) -> None:
        owner = None if decoder.owner is None else decoder.owner()
        if owner is not self:
            if owner is not None:
                owner.state()
            decoder.load(self._state)
            decoder.owner, self._decoder = weakref.ref(self), decoder
            decoder.enter(model, self.ids)

    def ahead(
        self, model: "HookedMamba", decoder: Decoder, tokens: int, sampler: Sampler, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """The next ``tokens`` ids, ``B tokens``, and whether all logits were sound (None: that was not looked at).

        Rows repeat their last id once they are done.
        """
        self._come(model, decoder)
        choice = decoder.choice
        choice.ids.copy_(self.ids)
        choice.done.copy_(self.done)
        choice.stops.copy_(self._stops)
        choice.count.zero_()
        told, sound = decoder.choose(tokens, sampler, generator)
        self._read += tokens
        self.ids, self.done = told[:, -1], choice.done.bool()
        return told, sound

    def logits(self, model: "HookedMamba", decoder: Decoder) -> Tensor:
        """Logits ``B V`` after reading the ids, in the decoder's memory."""
        self._come(model, decoder)
        decoder.run(None)
        self._read += 1
        return decoder.logits

    def chosen(self, model: "HookedMamba", decoder: Decoder, ids: Tensor, done: Tensor) -> None:
        """What a sampler made of the logits."""
        self.ids, self.done = ids, done
        decoder.enter(model, ids)


def _alike(sampler: Sampler | None) -> Sampler | None:
    """One sampler for all that take the most likely token, whatever tail they would cut."""
    return Sampler() if sampler is not None and sampler.greedy else sampler


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def weights_of(model: "HookedMamba") -> "tuple[list[kernels.Layer], kernels.Head]":
    """The weights as the kernels take them: views, to be dropped after use so that they keep no memory alive."""
    from mambascope.ops import step as kernels

    def of(linear: Any) -> tuple[Tensor, Tensor | None]:
        return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()

    layers = []
    for block in model.blocks:
        block = cast(Block, block)
        m = block.mixer
        (in_proj, in_bias), (conv, conv_bias) = of(m.in_proj), of(m.conv1d)
        (dt_proj, dt_bias), (out_proj, out_bias) = of(m.dt_proj), of(m.out_proj)
        x_proj, _ = of(m.x_proj)
        layers.append(
            kernels.Layer(
                block.norm.weight.detach(), in_proj, in_bias, conv[:, 0], conv_bias, x_proj, dt_proj, dt_bias,
                m.A_log.detach(), m.D.detach(), out_proj, out_bias, block.norm.eps, m.cfg.mixer_norm_eps,
            )
        )  # fmt: skip
    final = model.ln_final
    head = kernels.Head(final.weight.detach(), of(model.unembed)[0], model.embed.weight.detach(), final.eps)
    return layers, head


def why_no_decoder(model: "HookedMamba", batch: int) -> str:
    """Why the step kernels cannot serve this model; empty if they can."""
    from mambascope.ops import step as kernels

    if batch > kernels.MOST_ROWS:
        return f"{batch} rows are better served by matrix products"
    if model.cfg.activation != "silu":
        return f"activation {model.cfg.activation}"
    layers, head = weights_of(model)
    return next((why for why in (kernels.unfit(weights, head) for weights in layers) if why), "")


def fill(into: MambaState, layers: list[MambaState]) -> None:
    """Copy the layers' states into ``n_layers B …`` tensors: at one go where they lie like that already."""
    with torch.no_grad():
        for own, given in ((into.ssm, [s.ssm for s in layers]), (into.conv, [s.conv for s in layers])):
            whole = _slab(given, own)
            if whole is not None:
                own.copy_(whole)
            else:
                torch._foreach_copy_(list(own), given)  # pyright: ignore[reportPrivateImportUsage]


def _slab(parts: list[Tensor], like: Tensor) -> Tensor | None:
    """The one tensor that ``parts`` are the rows of, if they are."""
    first = parts[0]
    step = first.numel() * first.element_size()
    if any(p.data_ptr() != first.data_ptr() + i * step or not p.is_contiguous() for i, p in enumerate(parts)):
        return None
    if first.untyped_storage().nbytes() < first.storage_offset() * first.element_size() + step * len(parts):
        return None
    if step == 0 or any(p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for p in parts):
        return None
    return first.as_strided(like.shape, like.stride(), first.storage_offset())
