"""Threads, copies, pickles, transforms, replicas and odd arguments: right, or refused by name."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambascope.errors import BackendError, CacheError, ConfigError, HookError, InputError, UnknownNameError
from mambascope.hooks.occupancy import Occupancy
from mambascope.model import HookedMamba
from tests.conftest import error, make_model
from tests.hooks.letters import letter_tokenizer


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))


def erase(v: Tensor, hook: object) -> Tensor:
    return v * 0


# ---- threads


def meanwhile(act: Callable[[], Any]) -> Any:
    """What ``act`` gives, or raises, in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(act())
        except BaseException as caught:
            found.append(caught)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_another_thread_neither_meets_hooks_nor_adds_them(tokens: Tensor) -> None:
    model = make_model(backend="cpu", n_layers=2)
    found: dict[str, Any] = {}

    def look(v: Tensor, hook: object) -> None:
        found["run"] = meanwhile(lambda: model(tokens))
        found["hook"] = meanwhile(lambda: model.run_with_hooks(tokens, fwd_hooks=[("h1[2]", erase)]))
        found["add"] = meanwhile(lambda: model.add_hook("delta1", erase))

    with torch.no_grad():
        plain = model(tokens)
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[("h1[3]", look)]), plain)
        assert isinstance(found["run"], HookError)
        assert "hooks of another thread are in force" in str(found["run"])
        for how in ("hook", "add"):
            assert isinstance(found[how], HookError)
            assert r"copy.deepcopy(model)" in str(found[how])
        with model.hooks(fwd_hooks=[("delta1", erase)]):
            assert isinstance(meanwhile(lambda: model(tokens)), HookError)  # this thread need not be running
        assert torch.equal(meanwhile(lambda: model(tokens)), plain)
        twin = copy.deepcopy(model)
        with model.hooks(fwd_hooks=[("delta1", erase)]):
            assert torch.equal(meanwhile(lambda: twin(tokens)), plain)


def test_hooks_that_stay_are_refused_to_two_threads_at_once_and_plain_runs_are_not() -> None:
    occupancy, live = Occupancy(), [type("Point", (), {"live": True})()]
    with occupancy.running([]):
        assert meanwhile(lambda: occupancy.running([]).__enter__()) is None
        inside = meanwhile(lambda: occupancy.running(live).__enter__())
        assert isinstance(inside, HookError)
        assert "another thread is running it" in str(inside)
    with occupancy.hooking(), occupancy.hooking(), occupancy.running(live):
        assert isinstance(meanwhile(occupancy.check), HookError)
    assert isinstance(copy.deepcopy(occupancy), Occupancy)
    assert isinstance(pickle.loads(pickle.dumps(occupancy)), Occupancy)


# ---- copies, pickles, replicas


def test_models_survive_pickle_and_shallow_copies(backend: str, tokens: Tensor) -> None:
    model = make_model(backend=backend, n_layers=2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        plain = model(tokens)
        hooked = model.run_with_hooks(tokens, fwd_hooks=[("h1[3]", erase)])
        for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False), copy.copy(model)):
            assert torch.equal(twin(tokens), plain)
            assert torch.equal(twin.run_with_hooks(tokens, fwd_hooks=[("h1[3]", erase)]), hooked)
        assert error(plain, hooked) > 1e-4
        replica = model._replicate_for_data_parallel()
        assert replica(tokens).shape == hooked.shape
        assert replica.occupancy is model.occupancy  # its threads see each other


def test_caches_are_copied_with_their_model_and_not_pickled(tokens: Tensor) -> None:
    model = make_model(backend="cpu", n_layers=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        twin = copy.deepcopy(cache)
        assert twin.model is model
        assert torch.equal(twin["delta", 1], cache["delta", 1])
        assert twin["resid_pre", 1].data_ptr() != cache["resid_pre", 1].data_ptr()
    with pytest.raises(CacheError, match=r"cache\.save\(path\)"):
        pickle.dumps(cache)


# ---- transforms of torch


def test_functional_transforms_work_on_the_reference_and_are_refused_elsewhere(backend: str, tokens: Tensor) -> None:
    model = make_model(backend=backend, n_layers=1)
    resid = model(tokens, stop_at_layer=0).detach()

    def rest(r: Tensor) -> Tensor:
        return model(r, start_at_layer=0).square().mean()

    with pytest.raises(InputError, match=r"torch\.vmap over a model"):
        torch.func.vmap(lambda row: model(row[None]))(tokens)
    direction = torch.randn(resid.shape, generator=torch.Generator().manual_seed(3))
    if backend != "reference":
        with pytest.raises(BackendError, match="use backend='reference'"):
            torch.func.jvp(rest, (resid,), (direction,))
        return
    _, along = torch.func.jvp(rest, (resid,), (direction,))
    grad = torch.func.grad(rest)(resid)
    assert error(along, (grad * direction).sum()) < 1e-4
    params = dict(model.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (tokens,), {"return_type": "loss"}))(params)
    model(tokens, return_type="loss").backward()
    for name, p in params.items():
        assert error(found[name], p.grad) < 1e-5, name  # type: ignore[arg-type]


def test_export_and_checkpoint_give_the_same_numbers(backend: str, tokens: Tensor) -> None:
    model = make_model(backend=backend, n_layers=1)
    with torch.no_grad():
        exported = torch.export.export(model, (tokens,), strict=False)
        assert error(exported.module()(tokens), model(tokens)) < 5e-6
    resid = model(tokens, stop_at_layer=0).detach().requires_grad_()
    grads = []
    for run in (model, lambda *a, **k: torch.utils.checkpoint.checkpoint(model, *a, use_reentrant=False, **k)):
        run(resid, start_at_layer=0).square().mean().backward()
        grads.append(resid.grad.clone())  # type: ignore[union-attr]
        resid.grad = None
    assert torch.equal(*grads)


# ---- weights


def test_nan_weights_are_not_drawn_from(backend: str, tokens: Tensor) -> None:
    model = make_model(backend=backend, n_layers=1)
    with torch.no_grad():
        model.blocks[0].mixer.in_proj.weight[0, 0] = float("nan")
    assert model(tokens).isnan().all()
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="the logits hold NaN"):
            model.generate(tokens, max_new_tokens=2, temperature=temperature)


def test_tied_embeddings_stay_tied_and_two_are_refused() -> None:
    model, other = make_model(n_layers=1), make_model(seed=3, n_layers=1)
    model.load_state_dict(other.state_dict(), assign=True)
    assert model.unembed.weight is model.embed.weight
    apart = other.state_dict()
    apart["unembed.weight"] = apart["unembed.weight"] + 1
    before = model.W_E.clone()
    with pytest.raises(ConfigError, match="tie_embeddings=False"):
        model.load_state_dict(apart)
    assert torch.equal(model.W_E, before)
    free = make_model(n_layers=1, tie_embeddings=False)
    free.load_state_dict(apart)
    assert not torch.equal(free.unembed.weight, free.embed.weight)
    with pytest.raises(ConfigError, match="got dict"):
        HookedMamba({"d_model": 3})  # type: ignore[arg-type]


# ---- arguments


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (b"abc", "got bytes: decode"),
        (torch.zeros(1, 0, dtype=torch.long), "is empty"),
        (torch.zeros(0, 3, dtype=torch.long), "is empty"),
        (torch.zeros(1, 2, dtype=torch.bool), "integer ids"),
        (["a", 3], "got list"),
        ({"input_ids": [1]}, "got dict"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_text_and_no_ids_is_refused(value: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make_model(n_layers=1)(value)


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_lengths_around_the_chunk_are_alike_by_hooks_and_by_cache(backend: str, length: int) -> None:
    model = make_model(backend=backend, n_layers=1)
    ids, seen = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(length)), []
    with torch.no_grad():
        logits, cache = model.run_with_cache(ids)
        again = model.run_with_hooks(ids, fwd_hooks=[("h0", lambda h, hook: seen.append(h.clone()))])
    assert torch.equal(again, logits)
    assert error(torch.stack(seen, 1), cache["h", 0].full()) < 1e-6


def test_odd_keys_and_arithmetic_of_a_cache(tokens: Tensor) -> None:
    _, cache = make_model(n_layers=2).run_with_cache(tokens)
    for layer in ("1", 1.5, True):
        with pytest.raises(UnknownNameError, match="a layer is an integer"):
            cache["delta", layer]
    h, whole = cache["h", 1], cache["h", 1].full()
    assert torch.equal(h * 2 + 1 - h / 2, whole * 2 + 1 - whole / 2)
    assert torch.equal(1 + (-h) * 3, 3 * (-whole) + 1)
    assert torch.equal(2 - h, 2 - whole)
    assert torch.equal(2 * h @ torch.ones(5), 2 * whole @ torch.ones(5))
    assert bool((h == cache["h", 1]).all())
    assert not bool((h == cache["h", 0]).all())
    assert len({h, cache["h", 0]}) == 2
    with pytest.raises(AttributeError, match=r"lazy\.full\(\)\.mean"):
        h.mean()
    with pytest.raises(AttributeError, match="nonsense"):
        _ = h.nonsense
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(h)


def test_odd_tokens_and_paths(tmp_path: Path, tokens: Tensor) -> None:
    model = make_model(n_layers=1)
    model.tokenizer = letter_tokenizer()
    for value in (3, [], ["a", 3], None):
        with pytest.raises(InputError, match="to_tokens takes a text or a list of texts"):
            model.to_tokens(value)  # type: ignore[arg-type]
    for value in (999, -1, torch.tensor([[1, 50]])):
        with pytest.raises(InputError, match="outside the vocabulary of 50"):
            model.tokens_to_residual_directions(value)
    assert torch.equal(model.tokens_to_residual_directions(torch.tensor([[1, 2]])), model.W_U.T[[1, 2]][None])
    _, cache = model.run_with_cache(tokens)
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        cache.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        cache.save(tmp_path / "nowhere" / "file.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_adapted_projection_is_used_and_seen_by_the_cache(backend: str, tokens: Tensor) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.5

    model = make_model(backend=backend, n_layers=1)
    plain = model(tokens)
    nn.utils.parametrize.register_parametrization(model.blocks[0].mixer.in_proj, "weight", Half())
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        assert error(logits, plain) > 1e-3
        assert torch.equal(cache["delta", 0], model.run_with_cache(tokens, names_filter=["delta0"])[1]["delta", 0])


def test_a_cache_keeps_its_tokens_and_mask_when_the_caller_writes_into_theirs(backend: str, tokens: Tensor) -> None:
    model, mask = make_model(backend=backend, n_layers=2), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
        _, other = model.run_with_cache(tokens, attention_mask=mask.clone())
        wanted, ids = other["h", 1].full(), tokens.clone()
        tokens.zero_()
        mask.fill_(True)
        assert torch.equal(cache["h", 1].full(), wanted)
        assert torch.equal(cache.recording.tokens, ids)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # the embedding's input has no gradient
@pytest.mark.parametrize(
    "kind",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_torchs_own_hooks_fire_on_every_module_or_are_refused(kind: str, tokens: Tensor) -> None:
    model = make_model(backend="cpu", n_layers=1)
    for name, module in model.named_modules():
        if name in ("", "blocks"):  # a ModuleList has no forward pass
            continue
        fired: list[str] = []
        handle = getattr(module, kind)(lambda *_, fired=fired, name=name: fired.append(name))
        if name.endswith("conv1d"):
            with pytest.raises(HookError, match="carries a hook of torch's own"):
                model(tokens, return_type="loss")
        else:
            model(tokens, return_type="loss").backward()
            assert fired, name
        handle.remove()
