"""The block stack as recorded CUDA graphs: the GPU's work without Python's.

A forward pass of 24 layers launches some 250 kernels; where they are short, launching takes longer than running. So the
second time that a shape comes, its kernels (embedding, blocks, final norm) are recorded, and from then on replayed:
the same kernels on the same memory, so the same bits. The unembedding runs outside, on the recorded output, so no
result ever lies in a graph's memory.

A recording reads the weights where they lie: edits in place are seen by the next replay, and weights that were moved or
reassigned make a new recording. Nothing is recorded, and everything runs as it always did, where hooks, gradients,
padding, autocast or somebody else's tracing are at work.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from mambascope.hooks.run import PathTaken, Recorder, Run
from mambascope.hooks.sites import Clock
from mambascope.model import recording
from mambascope.model.decode import Decoder, Generation, fill, why_no_decoder
from mambascope.model.keeping import Addresses, Kept, run_keeping
from mambascope.model.sampling import Sampler
from mambascope.model.state import MambaState, State
from mambascope.model.straight import add_and_norm, through, took
from mambascope.model.stretches import Stretches
from mambascope.model.watch import Watch
from mambascope.ops import resolve_backend
from mambascope.ops.ready import unwatched

if TYPE_CHECKING:
    from mambascope.model.language_model import HookedMamba

__all__ = ["Graphs", "Stack", "StaleError", "piece_tokens"]

T = TypeVar("T")

RECORDED_BACKENDS = ("triton",)
_PIECE, _PIECE_WIDTH = 16_384, 1536  # tokens (batch x length) that a pass takes at a time up to that d_inner
_MOST_GRAPHS = 32
_MOST_SEEN = 1024
_LEAST_LIMIT = 2 << 30  # bytes that recordings may hold, or a sixteenth of the device's memory


def _switched_on() -> bool:
    return os.environ.get("MAMBASCOPE_GRAPHS", "1").lower() not in ("0", "false", "off", "no")


def piece_tokens(d_inner: int) -> int:
    """Tokens that a forward pass without gradient, hooks or cache takes at a time, and that are recorded at most:
    beyond, kernels run for longer than their launches take, and memory grows for nothing."""
    return max(_PIECE, _PIECE * _PIECE_WIDTH // d_inner)


@dataclass(frozen=True)
class Taped:
    """One recording: its static inputs and outputs, all in or beside the graph's own memory."""

    graph: recording.Recorded
    tokens: Tensor  # B L
    entering: MambaState | None  # n_layers B D N, n_layers B D K-1
    keeps: Addresses | None
    normed: Tensor | None  # B L M; none where the residual stream is kept
    leaving: MambaState | None
    norms: Tensor | None  # of the small weights, where a cache listens


class StaleError(Exception):
    """A pass took for granted what no longer holds, and must be made again."""


class Graphs:
    """A model's recordings. ``enabled`` is the switch (environment: ``MAMBASCOPE_GRAPHS=0``); ``clear`` frees all."""

    def __init__(self) -> None:
        self.enabled = _switched_on()
        self.watch = Watch()
        self.stretches = Stretches()
        self._lock = threading.Lock()
        self._decoders: dict[int, Decoder | str] = {}  # by rows; or why there is none
        self._kept: OrderedDict[Any, Taped] = OrderedDict()
        self._seen: OrderedDict[Any, str] = OrderedDict()  # shapes that came once, or why they cannot be recorded
        self._places: tuple[Any, ...] = ()
        self._weights: list[Tensor] = []  # what recordings read stays in memory, so that a replay can be taken back
        self._pool: Any = None
        self._held = 0  # bytes of the pool
        self._stream: Any = None  # of the last replay

    def __reduce__(self) -> Any:
        """A copy of a model, or one from a file, records for itself."""
        return (_fresh, (self.enabled,))

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drop every recording and its memory."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self.let_go()
        for decoder in self._decoders.values():
            owner = decoder.owner() if isinstance(decoder, Decoder) and decoder.owner is not None else None
            if owner is not None:
                owner.state()  # a running generation goes on elsewhere
        self._decoders.clear()
        self._kept.clear()
        self._seen.clear()
        self.stretches.clear()
        self._pool, self._held = None, 0

    def let_go(self) -> None:
        """Hold no memory of the weights any longer: they are about to move."""
        self._weights = []

    def _enter(self, model: "HookedMamba", wait: bool, unproven: bool = False) -> bool:
        """Take the lock, if nobody is at work around a model that is known to be nothing but its weights.

        ``unproven``: where the weights lie may be looked at later, by `stands`.
        """
        if not self.enabled or not _undisturbed(model.device):
            return False
        places = None if unproven and self._weights else self.watch.places()
        if not self._lock.acquire(blocking=wait):
            return False
        if places is not None and places != self._places:  # what was recorded reads memory that is no longer theirs
            self._clear()
            self._places = places
        if places is not None and not self._weights:
            self._weights = [w.detach() for w in self.watch.weights()]
        return True

    def stands(self, model: "HookedMamba") -> bool:
        """Whether the model is its weights alone, and these lie where recordings read them (with the lock held)."""
        return not self.watch.why_not(model) and self.watch.places() == self._places

    def claim(self, model: "HookedMamba", run: Run) -> "Stack | None":
        """The right to replay until ``release``; None where this pass must run eagerly."""
        if run.backend not in RECORDED_BACKENDS or run.needs_grad or not run.quiet:
            return None
        if run.recorder is not None and run.boundaries is None:
            return None
        # Another thread that replays does so on its own stream; this one need not wait for it.
        return Stack(self, model, run) if self._enter(model, wait=False, unproven=run.unproven) else None

    @contextmanager
    def decoding(self, model: "HookedMamba", batch: int, sampler: Sampler | None) -> "Iterator[Decoder | None]":
        """The decoder for ``batch`` rows while the lock is held; None where tokens must run as any other pass.

        It chooses tokens as ``sampler`` says, if it can, and gives logits.
        """
        backend, why = resolve_backend(model.backend, model.device, model.dtype)
        if backend != "triton" or self.watch.why_not(model) or not self._enter(model, wait=True):
            yield None
            return
        try:
            decoder = self._decoder(model, batch, sampler)
            if decoder is not None:
                self.come_to(model.device)
                took(model.blocks, PathTaken(backend, "step", why))
            yield decoder
        finally:
            self._lock.release()

    @contextmanager
    def entered(self, model: "HookedMamba", run: Run) -> Iterator[tuple[Any, ...] | None]:
        """The lock, and what a recording depends on beside its shape; None where nothing may be replayed."""
        if run.backend not in RECORDED_BACKENDS or not self._enter(model, wait=False):
            yield None
            return
        try:
            yield _matmul_switches()
        finally:
            self._lock.release()

    @contextmanager
    def replaying(self, device: torch.device) -> Iterator[None]:
        """The lock and the turn of the current stream, for a replay that was allowed before."""
        with self._lock:
            self.come_to(device)
            yield

    def room(self, device: torch.device) -> bool:
        """Whether `hold` would keep all that there is (with the lock held)."""
        return self._held <= _limit(device)

    def hold(self, device: torch.device, make: Callable[[Any], tuple[T, int]]) -> T:
        """What ``make`` records in the memory that all recordings share (with the lock held)."""
        if not self.room(device):
            self._clear()
        if self._pool is None:
            self._pool = recording.new_pool(device)
        made, held = make(self._pool)
        self._held += held
        return made

    def settled(self, going: Generation) -> State:
        """The states of a running generation, taken out of the decoder."""
        with self._lock:
            return going.state()

    def _decoder(self, model: "HookedMamba", batch: int, sampler: Sampler | None) -> Decoder | None:
        found = self._decoders.get(batch)
        with torch.inference_mode(False), torch.no_grad():
            try:
                if found is None:
                    found = self._decoders[batch] = why_no_decoder(model, batch) or Decoder(model, batch)
                if not isinstance(found, Decoder):
                    return None
                found.prepare(model, sampler if sampler is not None and sampler.greedy else None)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                self._decoders[batch] = recording.notice(f"a step of {batch} rows", error)
                return None
            if sampler is not None and not sampler.greedy:
                try:
                    found.prepare(model, sampler)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    found.refuse(sampler, recording.notice(f"the draw of tokens by {sampler}", error))
        return found

    # ---- with the lock held

    def come_to(self, device: torch.device) -> None:
        """Let the current stream wait for what another one last replayed: all recordings share their memory."""
        self._stream = recording.follow(device, self._stream)

    def find(self, stack: "Stack", shape: tuple[int, int], stateful: bool, carry: bool) -> Taped | None:
        """The recording for this shape; made now if the shape came before."""
        key = (shape, stateful, carry, stack.boundaries, _matmul_switches())
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        stack.prove()
        if key not in self._seen:  # the first time runs eagerly: kernels compile, and many shapes come only once
            self._seen[key] = ""
            if len(self._seen) > _MOST_SEEN:
                self._seen.popitem(last=False)
            return None
        if self._seen[key]:
            return None
        return self._record(key, stack, shape, stateful, carry)

    def _record(self, key: Any, stack: "Stack", shape: tuple[int, int], stateful: bool, carry: bool) -> Taped | None:
        model = stack.model
        if self._held > _limit(model.device):
            self._clear()
            self._seen[key] = ""
        while len(self._kept) >= _MOST_GRAPHS:
            self._kept.popitem(last=False)
        try:
            if self._pool is None:
                self._pool = recording.new_pool(model.device)
            with torch.inference_mode(False), torch.no_grad():
                made, held = _tape(stack, self._pool, shape, stateful, carry)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self._clear()  # the memory may be what is missing
            self._seen[key] = recording.notice(f"a forward pass of {shape[0]} x {shape[1]} tokens", error)
            return None
        self._held += held
        self._kept[key] = made
        return made


def _fresh(enabled: bool) -> Graphs:
    graphs = Graphs()
    graphs.enabled = enabled
    return graphs


class Stack:
    """A claimed model: call it piece by piece, then ``release`` it, after the outputs were read.

    What takes the host longest before a replay is to look whether it may be. So a pass that follows one where nothing
    stood in the way replays first and looks then, while the GPU works: `StaleError` if something does by now.
    """

    def __init__(self, graphs: Graphs, model: "HookedMamba", run: Run) -> None:
        self._graphs, self.model, self._run = graphs, model, run
        self.backend, self.boundaries = run.backend, run.boundaries

    def release(self) -> None:
        self._graphs._lock.release()

    def __call__(self, tokens: Tensor, layers: list[Any], carry: bool) -> Tensor | None:
        """The normalised residual ``B L M``, in graph memory: read it before the next call.

        None where this piece must run eagerly. ``layers`` gets the states after the piece, if ``carry`` asks for them.
        """
        shape = (tokens.shape[0], tokens.shape[1])
        if shape[0] * shape[1] > piece_tokens(self.model.cfg.d_inner):
            return None
        taped = self._graphs.find(self, shape, layers[0] is not None, carry)
        if taped is None:
            return None
        self._graphs.come_to(tokens.device)
        kept = None if taped.keeps is None else self._make_room(taped.keeps)
        taped.tokens.copy_(tokens, non_blocking=True)
        if taped.entering is not None:
            fill(taped.entering, layers)
        taped.graph.replay()
        self.prove()
        took(self.model.blocks, PathTaken(self.backend, "graph", self._run.why))
        entered = list(layers)
        if taped.leaving is not None:
            after = taped.leaving.map(torch.clone)
            layers[:] = [MambaState(*pair) for pair in zip(after.ssm, after.conv, strict=True)]
        if kept is None:
            return taped.normed
        return kept.tell(self.model, tokens, entered, self._run, cast(Tensor, taped.norms))

    def prove(self) -> None:
        """StaleError if something stands in the way that was not there when somebody last looked."""
        if self._run.unproven and not self._graphs.stands(self.model):
            raise StaleError
        self._run.unproven = False

    def _make_room(self, keeps: Addresses) -> Kept:
        try:
            return Kept(self.model, keeps)
        except torch.OutOfMemoryError:
            cast(Recorder, self._run.recorder).check_room()  # tells the sizes
            raise


def _undisturbed(device: torch.device) -> bool:
    """Whether nobody records, traces or transforms what runs now."""
    if device.type != "cuda" or not unwatched() or torch.is_autocast_enabled("cuda"):
        return False
    return not torch.cuda.is_current_stream_capturing()


def _limit(device: torch.device) -> int:
    return max(_LEAST_LIMIT, torch.cuda.get_device_properties(device).total_memory // 16)


def _matmul_switches() -> tuple[Any, ...]:
    """The settings that choose how torch multiplies matrices: a recording keeps what it was made with."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None) or matmul.allow_tf32
    reduced = (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction)
    return (precision, *reduced, torch.are_deterministic_algorithms_enabled())


def _tape(stack: Stack, pool: Any, shape: tuple[int, int], stateful: bool, carry: bool) -> tuple[Taped, int]:
    """Record the stack once; also the bytes by which the pool grew."""
    model = stack.model
    tokens = torch.zeros(shape, dtype=torch.long, device=model.device)
    entering = keeps = None
    if stateful:
        states = model.initial_state(shape[0]).layers
        entering = MambaState(torch.stack([s.ssm for s in states]), torch.stack([s.conv for s in states]))
    if stack.boundaries is not None:
        keeps = Addresses.on(model, shape, stack.boundaries)
    graph, (normed, leaving, norms), grown = recording.record(
        lambda: _run_stack(model, stack.backend, tokens, entering, carry, keeps), model.device, pool
    )
    return Taped(graph, tokens, entering, keeps, normed, leaving, norms), grown


def _run_stack(
    model: "HookedMamba",
    backend: Any,
    tokens: Tensor,
    entering: MambaState | None,
    carry: bool,
    keeps: Addresses | None,
) -> tuple[Tensor | None, MambaState | None, Tensor | None]:
    run = Run(backend, "recorded", Clock(), False, quiet=True)
    layers: list[Any] = [None] * len(model.blocks)
    if entering is not None:
        layers = [MambaState(*pair) for pair in zip(entering.ssm, entering.conv, strict=True)]
    embedded, normed, norms = model.embed(tokens), None, None
    if keeps is None:
        resid, out = through(model, embedded, layers, run, 0, len(layers))
        normed = add_and_norm(out, resid, model.ln_final, backend)[1]
    else:
        norms = run_keeping(model, embedded, layers, run, keeps)
    if not carry:
        return normed, None, norms
    return normed, MambaState(torch.stack([s.ssm for s in layers]), torch.stack([s.conv for s in layers])), norms
