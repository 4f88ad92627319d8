"""HookedMamba: a Mamba language model with a hook point at every intermediate."""

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mambascope import ops
from mambascope.config import MambaConfig
from mambascope.errors import ConfigError, InputError, StateError
from mambascope.hooks.occupancy import Occupancy
from mambascope.hooks.run import EditDone, PathTaken, Recorder, Run
from mambascope.hooks.sites import Clock, SitePoint
from mambascope.model.again import Repeats
from mambascope.model.block import Block
from mambascope.model.generation import GenerateMethods
from mambascope.model.graphs import Graphs, StaleError, piece_tokens
from mambascope.model.head import (
    Output,
    check_logits,
    kept_rows,
    loss_of,
    mean_loss,
    next_token_losses,
    unembed,
)
from mambascope.model.hooking import HookMethods
from mambascope.model.inputs import Entry, check_ids, entry_of, layers_of
from mambascope.model.norm import RMSNorm
from mambascope.model.scope import ScopeMethods
from mambascope.model.state import State
from mambascope.model.straight import add_and_norm, in_turn, through
from mambascope.model.text import TextMethods
from mambascope.model.watch import why_in_turn
from mambascope.ops.ready import unwatched

__all__ = ["HookedMamba"]


class HookedMamba(TextMethods, GenerateMethods, ScopeMethods, HookMethods):
    """A Mamba-1 language model (Gu & Dao, 2312.00752), open at every intermediate.

    With ``pattern`` in the config some or all layers are something else (attention, feed-forward, …; docs/models.md).
    Use :func:`mambascope.load` for a checkpoint; the constructor gives fresh random weights. Hook points are
    listed in ``mambascope.HOOK_POINTS``; ``model.explain_path()`` tells how each layer was last computed.
    ``backend`` is ``"auto"``, ``"triton"``, ``"cpu"``, ``"torch"`` or ``"reference"``.
    """

    def __init__(
        self,
        cfg: MambaConfig,
        tokenizer: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: ops.Backend = "auto",
    ) -> None:
        if not isinstance(cfg, MambaConfig):
            raise ConfigError(f"HookedMamba takes a MambaConfig, got {type(cfg).__name__}; ms.load(…) takes names")
        super().__init__()
        self._cfg = cfg
        self.tokenizer = tokenizer
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.hook_embed = SitePoint()
        self.blocks = nn.ModuleList([Block(cfg, letter) for letter in cfg.layers])
        self.ln_final = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        self._init_weights()
        if cfg.tie_embeddings:
            self.unembed.weight = self.embed.weight
        self.model_id = uuid.uuid4().hex
        self._hash: tuple[tuple[Any, ...], str] | None = None
        self._clock = Clock()
        self.occupancy = Occupancy()
        self._edits: list[EditDone] = []
        self.graphs, self.repeats = Graphs(), Repeats()
        self.setup()
        for point in self.hook_dict.values():
            cast(SitePoint, point).clock = self._clock
        self.backend = backend
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)
        self.eval()  # nothing differs between the modes; tools that patch activations insist on this one

    def _init_weights(self) -> None:
        std = self._cfg.initializer_range
        nn.init.normal_(self.embed.weight, std=std)
        nn.init.normal_(self.unembed.weight, std=std)
        for block in self.blocks:
            # Residual writes shrink with depth (GPT-2's rule, which the authors' code follows as well).
            with torch.no_grad():
                cast(Block, block).mixer.out_proj.weight.div_(self._cfg.n_layers**0.5)

    # ---- what it is -------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        # Asked some 25 times a pass: past torch's way to attributes, where the weight is an ordinary one.
        weight = self._modules["embed"]._parameters.get("weight")  # type: ignore[union-attr]
        return (self.embed.weight if weight is None else weight).device

    @property
    def cfg(self) -> MambaConfig:  # type: ignore[override]
        """The model's shape and options; its ``device`` follows the model."""
        if self._cfg.device != self.device:
            self._cfg = self._cfg.on(self.device)
        return self._cfg

    @property
    def backend(self) -> ops.Backend:
        """Where it computes: ``"auto"``, ``"triton"``, ``"cpu"``, ``"torch"`` or ``"reference"``; may be set."""
        return self._backend

    @backend.setter
    def backend(self, name: ops.Backend) -> None:
        ops.check_backend(name)
        self._backend: ops.Backend = name

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def W_E(self) -> Tensor:
        """Embedding, ``V M``."""
        return self.embed.weight

    @property
    def W_U(self) -> Tensor:  # type: ignore[override]
        """Unembedding, ``M V``."""
        return self.unembed.weight.T

    @property
    def b_U(self) -> Tensor:
        """The unembedding has no bias: zeros ``V``, for tools that add one."""
        return torch.zeros(self.cfg.d_vocab, device=self.device, dtype=self.dtype)

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """The sum of the out_proj biases of blocks [0, layer), ``M``."""
        total = torch.zeros(self.cfg.d_model, device=self.device, dtype=self.dtype)
        for block in self.blocks[:layer]:
            bias = cast(Block, block).mixer.out_proj.bias
            total = total if bias is None else total + bias
        return total

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in torch; tied embeddings stay tied, and two that differ are refused where the model has but one."""
        embed, unembed = state_dict.get("embed.weight"), state_dict.get("unembed.weight")
        tied = self.cfg.tie_embeddings
        self.graphs.let_go()  # before assign=True puts others in the weights' place
        if tied and embed is not None and unembed is not None and not torch.equal(embed, unembed.to(embed.device)):
            raise ConfigError(
                "embed.weight and unembed.weight differ, and this model has one for both; make it with "
                "tie_embeddings=False"
            )
        result = super().load_state_dict(state_dict, strict, assign)
        if tied:
            self.unembed.weight = self.embed.weight
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> "HookedMamba":
        self.graphs.let_go()
        return super()._apply(fn, recurse)

    def weight_hash(self) -> str:
        """SHA-256 over all parameters' names, shapes, dtypes and bytes; kept until a weight changes."""
        key = tuple((name, p.data_ptr(), p._version) for name, p in self.named_parameters())
        if self._hash is None or self._hash[0] != key:
            digest = hashlib.sha256()
            for name, p in self.named_parameters():
                digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
                digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data if p.ndim else b"")
            self._hash = (key, digest.hexdigest())
        return self._hash[1]

    def explain_path(self) -> list[PathTaken]:
        """How each layer was computed in the last forward pass: backend, form, the reason, and what was edited."""
        paths = [cast(Block, block).mixer.path for block in self.blocks]
        return [replace(p, edits=tuple(e for e in self._edits if e.layer == i)) for i, p in enumerate(paths)]

    def edits_done(self) -> list[EditDone]:
        """What each intervention did in the last forward pass, in the order of their first calls."""
        return list(self._edits)

    # ---- running ----------------------------------------------------------------------------------

    def forward(
        self,
        input: Any,
        return_type: Literal["logits", "loss", "both", "normed"] | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        logits_to_keep: int | None = None,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        recorder: Recorder | None = None,
    ) -> Any:
        """Run the model.

        ``input``: text, a list of texts, ids ``B L`` (or ``L``), or with ``start_at_layer`` a residual stream
        ``B L M`` entering that block. ``attention_mask`` ``B L`` marks real tokens; padding may stand on either
        side. ``state`` continues a text. Returns logits ``B L V`` (the last ``logits_to_keep`` positions), the
        mean next-token loss in nats (``B L-1`` with ``loss_per_token``), both, "normed", the normalised residual
        ``B L M`` that the unembedding reads, or None; with
        ``stop_at_layer`` the residual stream entering that block; with ``return_state`` a pair
        ``(output, State)``. Cost: O(L) in time; without gradient long inputs run in pieces of 16,384 tokens
        (more in narrow models).
        ``recorder`` is how ``run_with_cache`` listens in.
        """
        if return_type not in ("logits", "loss", "both", "normed", None):
            raise InputError(f"return_type must be 'logits', 'loss', 'both', 'normed' or None, got {return_type!r}")
        first, last = layers_of(self.cfg.n_layers, start_at_layer, stop_at_layer, return_state)
        entry = entry_of(self, input, prepend_bos, attention_mask, start_at_layer)
        if entry.tokens is None and return_type in ("loss", "both") and stop_at_layer is None:
            raise InputError("the loss needs tokens; with start_at_layer ask for return_type='logits'")
        if state is not None:
            self.check_state(state, entry.batch)
        run = self._new_run(entry, state, recorder)
        compiling = torch.compiler.is_compiling()
        alone = nullcontext() if compiling else self.occupancy.running(self.hook_dict.values())
        how = (first, last, return_type, loss_per_token, logits_to_keep, stop_at_layer, return_state)
        with alone, self._clock_at(entry, state):  # a hook may call the model again: that pass has its own clock
            try:
                return self._forward(entry, run, state, *how)
            except StaleError:
                return self._forward(entry, self._new_run(entry, state, recorder, sure=True), state, *how)

    def _forward(
        self,
        entry: Entry,
        run: Run,
        state: State | None,
        first: int,
        last: int,
        return_type: str | None,
        loss_per_token: bool,
        keep: int | None,
        stop: int | None,
        return_state: bool,
    ) -> Any:
        layers: list[Any] = [None] * self.cfg.n_layers
        if state is not None:
            layers = list(state.layers)
        wants_loss, wants_logits = return_type in ("loss", "both"), return_type in ("logits", "both")
        wants_rows = wants_logits or return_type == "normed"
        if wants_loss and stop is None and entry.length < 2:
            raise InputError("the loss needs at least two tokens: one to predict from, one to predict")
        if stop is not None:
            resid, out = self._through(entry, 0, entry.length, run, layers, first, last, return_state)
            return self._with_state(resid if out is None else resid + out, entry, state, layers, return_state)
        pieces = self._pieces_of(entry, run)
        stack = self.graphs.claim(self, run) if entry.tokens is not None else None
        carry = return_state or len(pieces) > 1
        sized = not wants_logits or keep is not None  # whether the logits are known to fit
        kept, losses, logits, loss = [], [], None, None
        try:
            for begin, end in pieces:
                normed = None if stack is None else stack(cast(Tensor, entry.tokens)[:, begin:end], layers, carry)
                if not sized:  # asked while a recording runs: that hides what asking costs
                    sized = check_logits(self, entry.batch * entry.length)
                if normed is None:
                    normed = self._normed(*self._through(entry, begin, end, run, layers, first, last, carry), run)
                if wants_loss and entry.tokens is not None:
                    if len(pieces) == 1 and not loss_per_token:
                        loss = loss_of(self, normed, entry.tokens, entry.padding)
                    if loss is None:
                        stop_at = min(end, entry.length - 1)
                        targets = entry.tokens[:, begin + 1 : stop_at + 1]
                        losses.append(next_token_losses(self, normed[:, : stop_at - begin], targets))
                if wants_rows:
                    last_of = kept_rows(normed, begin, end, entry, keep)
                    once = stack is None or (len(pieces) == 1 and wants_logits)  # read before its memory is given back
                    kept.append(last_of if once else last_of.clone())
            if wants_rows:
                logits = torch.cat(kept, 1) if len(kept) > 1 else kept[0]
            if wants_logits:
                logits = unembed(self, cast(Tensor, logits))
        finally:
            if stack is not None:
                stack.release()
        if losses:
            loss = mean_loss(torch.cat(losses, 1), entry.padding, loss_per_token)
        out: Any = logits if loss is None else loss if logits is None else Output(logits, loss)
        return self._with_state(out, entry, state, layers, return_state)

    def _through(
        self, entry: Entry, begin: int, end: int, run: Run, layers: list[Any], first: int, last: int, carry: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream ``B L M`` after the blocks, of columns [begin, end), but for what the last one adds to it
        (None: that is in it); ``layers`` gets the new states, all of them with ``carry``."""
        if run.unproven and self.graphs.watch.why_not(self):
            raise StaleError
        run.unproven = False
        if run.quiet and run.recorder is not None:
            run.recorder.check_room()
        resid = entry.resid if entry.tokens is None else self.hooked_embed(entry.tokens[:, begin:end], run)
        if run.quiet:
            return through(self, resid, layers, run, first, last)
        if self.cfg.pattern and run.padding is None and run.recorder is None and self._calm():
            return in_turn(self, resid, layers, run, first, last)
        return self.graphs.stretches.run(self, resid, layers, run, (first, last), carry), None

    def _normed(self, resid: Tensor, out: Tensor | None, run: Run) -> Tensor:
        """The final norm of the residual stream, ``out`` added to it."""
        if out is not None and run.recorder is None:
            return add_and_norm(out, resid, self.ln_final, run.backend)[1]
        if out is not None and run.recorder is not None:
            resid = resid + out
            run.recorder.take(str(cast(Block, self.blocks[-1]).hook_resid_post.name), resid)
        return self.ln_final(resid, run)

    def hooked_embed(self, tokens: Tensor, run: Run) -> Tensor:
        """Token embeddings ``B L M``, passed through ``hook_embed``."""
        return run.emit(self.hook_embed, self.embed(tokens))

    def run_block(self, layer: int, resid: Tensor, run: Run, state: Any) -> tuple[Tensor, Any]:
        block = cast(Block, self.blocks[layer])
        resid = resid.to(block.residual_dtype)
        if run.recorder is not None:
            run.recorder.begin_block(layer, resid, state)
        return block(resid, run, state)

    def _with_state(self, out: Any, entry: Entry, state: State | None, layers: list[Any], return_state: bool) -> Any:
        if not return_state:
            return out
        start = state.position if state is not None else 0
        read = entry.length if entry.padding is None else entry.padding.lengths
        return out, State(layers, start + read, self.model_id)

    def _new_run(self, entry: Entry, state: State | None, recorder: Recorder | None, sure: bool = False) -> Run:
        """What a pass goes by; ``sure``: nothing is presumed of who sits in the model."""
        needs_grad = self._needs_grad(entry.resid, state)
        backend, why = ops.resolve_backend(self.backend, self.device, self.dtype, needs_grad)
        if self.cfg.pattern:
            why = f"{why}; {why_in_turn(self.cfg)}"
        alone = entry.padding is None and (recorder is None or recorder.only_inputs())
        unproven = alone and not sure and not needs_grad and self._presumed()
        quiet, grows = unproven or (alone and self._quiet()), self._clock.grows and not needs_grad
        about = (recorder, entry.padding, needs_grad, quiet, grows, unproven)
        run = Run(cast(ops.Backend, backend), why, self._clock, True, *about)
        if recorder is not None:
            recorder.begin(entry.tokens, entry.padding, entry.bos, backend, (entry.batch, entry.length), quiet)
        return run

    def _quiet(self) -> bool:
        """Whether nobody sits in the model and nobody traces it: then no hook point needs to be walked past."""
        return self.cfg.activation == "silu" and unwatched() and not self.graphs.watch.why_not(self)

    def _presumed(self) -> bool:
        """Whether `_quiet` may be looked at later: it was so last time, and no hook came since."""
        return self.cfg.activation == "silu" and unwatched() and self.graphs.watch.presumed()

    def _calm(self) -> bool:
        """As `_quiet`, in a model with other mixers, which run with their points: only Mamba's may be passed by."""
        return self.cfg.activation == "silu" and unwatched() and not self.graphs.watch.look(self)

    def _needs_grad(self, resid: Tensor | None, state: State | None) -> bool:
        return torch.is_grad_enabled() and (
            any(p.requires_grad for p in self.parameters())
            or (resid is not None and resid.requires_grad)
            or (state is not None and any(t.requires_grad for s in state.layers for t in s.tensors().values()))
        )

    @contextmanager
    def _clock_at(self, entry: Entry, state: State | None) -> Iterator[None]:
        clock = self._clock
        before = (clock.length, clock.start, clock.padding, clock.batch, clock.edits, clock.applied, clock.grows)
        clock.length, clock.padding, clock.batch = entry.length, entry.padding, entry.batch
        clock.edits, clock.applied, clock.ran, clock.grows = {}, {}, True, False  # a hook's own pass owns no state
        clock.start = state.position if state is not None else 0
        try:
            yield
        finally:
            self._edits = list(clock.edits.values())
            (
                clock.length, clock.start, clock.padding, clock.batch, clock.edits, clock.applied, clock.grows
            ) = before  # fmt: skip

    def _pieces_of(self, entry: Entry, run: Run) -> list[tuple[int, int]]:
        """Column ranges to run one after the other, the states carried between them."""
        whole = [(0, entry.length)]
        if "a" in self.cfg.layers:  # every piece would read all keys before it again, and hold them as well
            return whole
        most = piece_tokens(self.cfg.d_inner)
        if entry.batch * entry.length <= most or entry.tokens is None or entry.padding is not None:
            return whole
        if run.needs_grad or run.recorder is not None:
            return whole
        if not run.quiet and any(cast(SitePoint, point).live for point in self.hook_dict.values()):
            return whole
        size = max(1, most // entry.batch)
        return [(a, min(a + size, entry.length)) for a in range(0, entry.length, size)]

    def check_state(self, state: State, batch: int) -> None:
        """StateError unless ``state`` was made by this model for ``batch`` rows."""
        if not isinstance(state, State):
            raise StateError(f"state must be a mambascope State, got {type(state).__name__}")
        if state.model_id != self.model_id:
            raise StateError("the state was made by another model")
        if len(state.layers) != self.cfg.n_layers:
            raise StateError(f"the state has {len(state.layers)} layers, the model {self.cfg.n_layers}")
        like: dict[Any, Any] = {}
        for i, layer in enumerate(state.layers):
            mixer = cast(Block, self.blocks[i]).mixer
            kind = (type(mixer), id(mixer.cfg), mixer.placed.dtype, mixer.placed.device)
            if kind not in like:
                like[kind] = mixer.initial_state(0)
            mixer.check_state(layer, like[kind], batch, f"layer {i}")

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token, for ``batch`` rows: zeros, and empty key-value caches."""
        return State([cast(Block, b).mixer.initial_state(batch) for b in self.blocks], 0, self.model_id)

    def step(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token for every row: ids ``B`` (or ``B 1``) -> logits ``B V`` and the new state.

        Hooks fire, with absolute positions. Cost per token is constant, whatever was read before, but for attention
        without a window, which reads and copies its keys and values (:meth:`generate` does not copy them).
        """
        tokens = torch.as_tensor(tokens, device=self.device)
        tokens = tokens.reshape(-1, 1) if tokens.ndim < 2 else tokens
        if tokens.ndim == 2 and tokens.shape[1] != 1:
            raise InputError(
                f"step takes one token a row, got shape {tuple(tokens.shape)}; give more to model(…, state=)"
            )
        state = state if state is not None else self.initial_state(tokens.shape[0])
        if not self._needs_grad(None, state):
            check_ids(tokens, self.cfg.n_tokens)
            self.check_state(state, tokens.shape[0])
            with self.graphs.decoding(self, tokens.shape[0], None) as decoder:
                if decoder is not None:
                    self._edits = []
                    with torch.no_grad():
                        logits, layers = decoder.step(self, tokens[:, 0], state)
                    return logits, State(layers, state.position + 1, self.model_id)
        with self._absolute():
            logits, after = self(tokens, state=state, return_state=True)
        return logits[:, 0], after

    @contextmanager
    def _absolute(self, grows: bool = False) -> Iterator[None]:
        """Positions count from the first token ever read; ``grows``: passes may append to the states they are given."""
        clock = self._clock
        before = clock.absolute, clock.grows
        clock.absolute, clock.grows = True, grows
        try:
            yield
        finally:
            clock.absolute, clock.grows = before
