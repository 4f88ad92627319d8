"""Hook points fire where, when and with what the table says, and nothing is silent."""

import pytest
import torch

from mambascope.errors import HookError, UnknownNameError
from mambascope.hooks.points import hook_names, points_of, spec_of
from mambascope.model import HookedMamba
from tests.conftest import error, make_model


def shape_of(name: str, model: HookedMamba, batch: int, length: int) -> tuple[int, ...]:
    cfg = model.cfg
    size = {"B": batch, "L": length, "M": cfg.d_model, "D": cfg.d_inner, "N": cfg.d_state, "R": cfg.dt_rank, "1": 1}
    return tuple(size[letter] for letter in spec_of(name).shape.split())


def test_every_hook_point_fires_once_and_reading_changes_no_bit(model: HookedMamba, tokens: torch.Tensor) -> None:
    fired: dict[str, list[tuple[int, ...]]] = {}

    def read(value: torch.Tensor, hook: object) -> None:
        fired.setdefault(hook.name, []).append(tuple(value.shape))  # type: ignore[attr-defined]

    with torch.no_grad():
        plain = model(tokens)
        seen = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, read)])
    assert torch.equal(plain, seen)
    assert list(hook_names(3)) == list(model.hook_dict)
    assert fired.keys() == model.hook_dict.keys()
    for name, shapes in fired.items():
        if name.endswith("hook_h"):
            full = shape_of(name, model, 2, 70)
            assert shapes == [(full[0], *full[2:])] * 70
        else:
            assert shapes == [shape_of(name, model, 2, 70)], name


@pytest.mark.parametrize("tail", [s.name for s in points_of("m") if s.scope == "block"])
def test_each_hook_alone_reads_without_a_trace_and_edits_with_one(
    model: HookedMamba, tokens: torch.Tensor, tail: str
) -> None:
    name = f"blocks.1.{tail}"
    with torch.no_grad():
        plain = model(tokens)
        assert torch.equal(plain, model.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook: None)]))
        assert torch.equal(plain, model.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook: v)]))
        same = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook: v.clone())])
        assert error(same, plain) < 2e-6
        edited = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook: v * 1.5 + 0.3)])
        assert error(edited, plain) > 1e-4

        def in_place(v: torch.Tensor, hook: object) -> None:
            v.mul_(1.5).add_(0.3)

        assert error(model.run_with_hooks(tokens, fwd_hooks=[(name, in_place)]), edited) < 1e-5
        assert torch.equal(plain, model(tokens))
    graph = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook: None)])
    assert torch.equal(plain, graph)  # where gradients flow, too
    assert graph.requires_grad


def test_positions_address_what_python_would(model: HookedMamba, tokens: torch.Tensor) -> None:
    seen: dict[str, object] = {}

    def note(key: str):
        def fn(value: torch.Tensor, hook: object) -> None:
            pos = hook.pos  # type: ignore[attr-defined]
            seen[key] = (value.clone(), pos if isinstance(pos, int) else pos.tolist())

        return fn

    base = "blocks.1.hook_resid_pre"
    sites = {"[3]": 3, "[-1]": -1, "[2:5]": slice(2, 5), "[-4:]": slice(-4, None), "[::20]": slice(None, None, 20)}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        model.run_with_hooks(tokens, fwd_hooks=[(base + text, note(text)) for text in sites])
    for text, index in sites.items():
        value, pos = seen[text]  # type: ignore[misc]
        assert torch.equal(value, cache["resid_pre", 1][:, index])
        assert pos == (list(range(70))[index])


def test_state_hooks_are_called_in_order_with_their_state(model: HookedMamba, tokens: torch.Tensor) -> None:
    calls: list[tuple[int, torch.Tensor]] = []
    sites = ["blocks.1.mixer.hook_h[-1]", "blocks.1.mixer.hook_h[0]", "blocks.1.mixer.hook_h[10:14]"]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        model.run_with_hooks(
            tokens, fwd_hooks=[(s, lambda h, hook: calls.append((hook.pos, h.clone()))) for s in sites]
        )
    assert [pos for pos, _ in calls] == [0, 10, 11, 12, 13, 69]
    for pos, h in calls:
        assert error(h, cache["h", 1][:, pos]) < 1e-6


def test_edit_of_the_state_propagates_by_the_closed_form(backend: str, tokens: torch.Tensor) -> None:
    """y[t'] changes by sum_n C[t', n] exp(A sum_{t < tau <= t'} delta[tau]) e for every t' >= t."""
    model = make_model(backend=backend)
    t, layer = 20, 2
    e = torch.randn(model.cfg.d_inner, model.cfg.d_state, generator=torch.Generator().manual_seed(3))
    got: list[torch.Tensor] = []
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        y = f"blocks.{layer}.mixer.hook_y"
        hooks = [(f"blocks.{layer}.mixer.hook_h[{t}]", lambda h, hook: h + e), (y, lambda v, hook: got.append(v))]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    change = got[0].double() - cache[y].double()
    assert change[:, :t].abs().max() == 0
    delta, C = cache["delta", layer].double(), cache["C", layer].double()
    A = model.decay(layer).double()
    decay = torch.exp(A * delta[:, t + 1 :].cumsum(1)[..., None])  # B T D N
    decay = torch.cat([torch.ones_like(decay[:, :1]), decay], 1)
    expected = (C[:, t:, None] * decay * e.double()).sum(-1)
    assert ((change[:, t:] - expected).abs().max() / expected.abs().max()) < 1e-5
    assert model.explain_path()[layer].form == "split"
    assert model.explain_path()[0].form == "fused"


def test_path_is_reported(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        model(tokens)
        assert {p.form for p in model.explain_path()} == {"fused"}
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mixer.hook_delta", lambda v, hook: v * 2)])
        assert [p.form for p in model.explain_path()] == ["open", "fused", "fused"]
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mixer.hook_write", lambda v, hook: v * 2)])
        assert [p.form for p in model.explain_path()] == ["fused", "exposed", "fused"]


def test_forks_are_separate(model: HookedMamba, tokens: torch.Tensor) -> None:
    """An edit in place of one reader of u leaves the other readers alone; mixer_in leaves the stream alone."""
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[("blocks.1.mixer.hook_u_select", lambda v, hook: v.zero_())]):
            _, cache = model.run_with_cache(tokens)
        assert torch.equal(cache["u_write", 1], clean["u_write", 1])
        assert cache["u_select", 1].abs().max() == 0
        assert error(cache["delta", 1], clean["delta", 1]) > 1e-3
        with model.hooks(fwd_hooks=[("blocks.1.hook_mixer_in", lambda v, hook: v.zero_())]):
            _, cache = model.run_with_cache(tokens)
        assert torch.equal(cache["resid_pre", 1], clean["resid_pre", 1])
        assert torch.equal(cache["resid_post", 1], cache["resid_pre", 1] + cache["mixer_out", 1])


def test_backward_hooks_fire_on_every_point_and_give_the_gradient(backend: str, tokens: torch.Tensor) -> None:
    model = make_model(backend=backend)
    grads: dict[str, torch.Tensor] = {}
    names = [n for n in model.hook_dict if not n.endswith(("hook_h", "A_bar", "B_bar", "write"))]
    loss = model.run_with_hooks(
        tokens,
        return_type="loss",
        bwd_hooks=[(n, lambda g, hook: grads.__setitem__(hook.name, g.clone())) for n in names],
    )
    loss.backward()
    assert set(grads) == set(names)
    # Against a finite difference: add a small direction at one site, compare the loss with the gradient's promise.
    double = make_model(backend="reference", dtype=torch.float64)
    for name in (
        "blocks.1.hook_resid_pre",
        "blocks.1.mixer.hook_delta",
        "blocks.2.mixer.hook_y",
        "blocks.0.mixer.hook_B",
    ):
        v = torch.randn(grads[name].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        step = 1e-5

        def shifted(sign: float, name: str = name, v: torch.Tensor = v) -> torch.Tensor:
            return double.run_with_hooks(
                tokens, return_type="loss", fwd_hooks=[(name, lambda x, hook: x + sign * step * v)]
            )

        slope = (shifted(1) - shifted(-1)).item() / (2 * step)
        assert abs(slope - (grads[name].double() * v).sum().item()) < 1e-3 * max(1e-2, abs(slope))


def test_backward_hook_on_the_state_sees_the_adjoint_in_reverse(backend: str) -> None:
    model = make_model(backend=backend)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(2))
    seen: list[tuple[int, torch.Tensor]] = []
    loss = model.run_with_hooks(
        tokens, return_type="loss", bwd_hooks=[("blocks.1.mixer.hook_h[2:7]", lambda g, hook: seen.append(g.clone()))]
    )
    loss.backward()
    assert len(seen) == 5
    double = make_model(backend="reference", dtype=torch.float64)
    v = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for order, t in enumerate((6, 5, 4, 3, 2)):
        ends = [
            double.run_with_hooks(
                tokens,
                return_type="loss",
                fwd_hooks=[(f"blocks.1.mixer.hook_h[{t}]", lambda h, hook, s=s: h + s * 1e-5 * v)],
            ).item()
            for s in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(slope - (seen[order].double() * v).sum().item()) < 1e-3 * max(1e-3, abs(slope)), t


def test_bad_sites_and_bad_hooks_are_errors_and_leave_no_hook(model: HookedMamba, tokens: torch.Tensor) -> None:
    def run(site: object, fn: object = lambda v, hook: None) -> None:
        with torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=[(site, fn)])

    with pytest.raises(UnknownNameError, match=r"blocks\.1\.mixer\.hook_delta"):
        run("blocks.1.mixer.hook_dleta")
    with pytest.raises(UnknownNameError):
        run("blocks.7.hook_resid_pre")
    with pytest.raises(HookError, match="accepts no hook point"):
        run(lambda name: False)
    with pytest.raises(HookError, match="only 70 tokens"):
        run("blocks.1.hook_resid_pre[70]")
    with pytest.raises(HookError, match="only 70 tokens"):
        run("blocks.1.mixer.hook_h[-71]")
    with pytest.raises(HookError, match="addresses no token"):
        run("blocks.1.hook_resid_pre[80:90]")
    with pytest.raises(HookError, match="neither an integer nor a slice"):
        run("blocks.1.hook_resid_pre[a]")
    with pytest.raises(HookError, match=r"returned shape \(2, 69, 24\), expected \(2, 70, 24\)"):
        run("blocks.1.hook_resid_pre", lambda v, hook: v[:, 1:])
    with pytest.raises(HookError, match=r"returned dtype torch\.float64"):
        run("blocks.1.hook_resid_pre", lambda v, hook: v.double())
    with pytest.raises(HookError, match="must return a tensor or None, got float"):
        run("blocks.1.hook_resid_pre", lambda v, hook: 1.0)
    with pytest.raises(HookError, match="must be callable"):
        run("blocks.1.hook_resid_pre", 3)
    with pytest.raises(ZeroDivisionError):
        run("blocks.1.mixer.hook_h[3]", lambda v, hook: 1 / 0)
    assert not any(point.live for point in model.hook_dict.values())
    assert model._clock.length == 0


def test_ragged_rows_are_addressed_by_their_own_tokens(model: HookedMamba) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 50, (1, n), generator=generator) for n in (11, 7)]
    batch = torch.zeros(2, 13, dtype=torch.long)
    mask = torch.zeros(2, 13)
    batch[0, 2:13], mask[0, 2:13] = rows[0][0], 1
    batch[1, 1:8], mask[1, 1:8] = rows[1][0], 1
    site_edits = {
        "blocks.1.hook_resid_pre[-2]": lambda v, hook: v + 1,
        "blocks.0.mixer.hook_delta[3:5]": lambda v, hook: v * 2,
        "blocks.1.mixer.hook_h[-1]": lambda h, hook: h * 0.5,
        "blocks.2.mixer.hook_h[4]": lambda h, hook: h + 1,
        "blocks.0.mixer.hook_h": lambda h, hook: h * 0.9,
    }
    with torch.no_grad():
        for site, fn in site_edits.items():
            both, state = model.run_with_hooks(batch, attention_mask=mask, return_state=True, fwd_hooks=[(site, fn)])
            for b, (row, columns) in enumerate(zip(rows, (slice(2, 13), slice(1, 8)), strict=True)):
                alone, own = model.run_with_hooks(row, return_state=True, fwd_hooks=[(site, fn)])
                assert error(both[b, columns], alone[0]) < 5e-6, site
                assert error(state.ssm[:, b], own.ssm[:, 0]) < 5e-6, site


def test_a_hook_may_run_the_model_again(model: HookedMamba, tokens: torch.Tensor) -> None:
    inner: list[torch.Tensor] = []

    def nested(value: torch.Tensor, hook: object) -> None:
        if not inner:
            inner.append(torch.zeros(()))
            inner[0] = model(tokens[:, :5])

    with torch.no_grad():
        plain, short = model(tokens), model(tokens[:, :5])
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", nested)]), plain)
    assert torch.equal(inner[0], short)


@pytest.mark.parametrize("steps", [(20,), (0, 69), (5, 6, 66)])
def test_gradients_flow_through_state_edits(backend: str, tokens: torch.Tensor, steps: tuple[int, ...]) -> None:
    def gradients(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = make_model(backend=backend, dtype=dtype)
        hooks = [(f"blocks.1.mixer.hook_h[{t}]", lambda h, hook: h * 0.5 + h.pow(2)) for t in steps]
        model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients("reference", torch.float64)
    for name, grad in gradients(backend, torch.float32).items():
        assert error(grad, exact[name]) < 1e-4, name


def test_the_gradient_through_a_state_edit_is_the_slope_of_the_loss(tokens: torch.Tensor) -> None:
    model = make_model(backend="reference", dtype=torch.float64)
    hooks = [("blocks.1.mixer.hook_h[20]", lambda h, hook: h * 0.5 + h.pow(2))]
    weight = model.blocks[0].mixer.in_proj.weight
    v = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks)
    promised = (torch.autograd.grad(loss, weight)[0] * v).sum().item()

    def shifted(step: float) -> float:
        with torch.no_grad():
            weight.add_(step * v)
            value = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks).item()
            weight.sub_(step * v)
        return value

    assert abs((shifted(1e-6) - shifted(-1e-6)) / 2e-6 - promised) < 1e-6
