"""LSTM, gated conv, S4D and H3 against plain torch in float64, step against sequence, and hooks inside them."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mambascope as ms
from mambascope.config import MambaConfig
from mambascope.errors import ConfigError, HookError, InputError, UnknownNameError
from mambascope.hooks.points import spec_of
from mambascope.hooks.run import Run
from mambascope.loading.saving import save_model
from mambascope.model import HookedMamba
from mambascope.model.mixers.conv import LONG
from mambascope.training.floor import measure_floor
from mambascope.training.loop import make_optimizer
from mambascope.training.recipe import TrainSettings
from tests.conftest import error

V, M, D, N = 19, 16, 20, 6
LETTERS = "lgsph"
RECURRENT = "lsph"


def model_of(letter: str, dtype: torch.dtype = torch.float64, layers: int = 1, **options: object) -> HookedMamba:
    """Lively weights, so that a wrong term shows."""
    torch.manual_seed(5)
    base: dict[str, object] = {"d_model": M, "n_layers": layers, "d_vocab": V, "d_inner": D, "d_state": N, "d_conv": 3}
    cfg = MambaConfig(**{**base, "pattern": letter, "dt_max": 0.8, "proj_bias": True, **options})  # type: ignore[arg-type]
    model = HookedMamba(cfg)
    with torch.no_grad():
        model.embed.weight.mul_(40)
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def ids_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(length))


def residual(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, M, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)


# ---- plain torch


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def conv(x: Tensor, module: nn.Conv1d) -> Tensor:
    width = module.weight.shape[-1]
    bias = None if module.bias is None else module.bias.double()
    return F.conv1d(F.pad(x.mT, (width - 1, 0)), module.weight.double(), bias, groups=x.shape[-1]).mT


def ssm(u: Tensor, module: nn.Module) -> Tensor:
    """Every channel and state by itself, one step after the other: y + D u."""
    delta = module.log_dt.double().exp()
    A = -module.A_log.double().exp()
    C, twice = module.C.double(), 1
    if module.A_imag is not None:
        A, C, twice = A + 1j * module.A_imag.double(), torch.view_as_complex(C), 2
    A_bar = torch.exp(delta[:, None] * A)
    B_bar = (A_bar - 1) / A  # zero-order hold with B = 1
    h = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype)
    ys = []
    for t in range(u.shape[1]):
        h = A_bar * h + B_bar * u[:, t, :, None]
        y = twice * (C * h).sum(-1)
        ys.append(y.real if y.is_complex() else y)
    return torch.stack(ys, 1) + module.D.double() * u


def lstm(x: Tensor, module: nn.LSTM) -> Tensor:
    W, U, b, c_bias = (w.double() for w in module.all_weights[0])
    h = c = torch.zeros(x.shape[0], D, dtype=torch.float64)
    out = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ W.T + h @ U.T + b + c_bias).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out, 1)


def plain(letter: str, mixer: nn.Module, r: Tensor) -> Tensor:
    """The mixer's equations, written out."""
    if letter == "l":
        inner = lstm(r, mixer.lstm)
    else:
        x = r @ mixer.in_proj.weight.double().T + mixer.in_proj.bias.double()
    if letter in "gs":
        x, z = x.chunk(2, -1)
        u = silu(conv(x, mixer.conv1d))
        inner = (u if letter == "g" else ssm(u, mixer.ssm)) * silu(z)
    elif letter == "p":
        inner = silu(ssm(x, mixer.ssm))
    elif letter == "h":
        q, k, v = x.chunk(3, -1)
        inner = q * ssm(conv(k, mixer.shift) * v, mixer.ssm)
    return inner @ mixer.out_proj.weight.double().T + mixer.out_proj.bias.double()


CASES = [(letter, "") for letter in "lg"] + [(letter, init) for letter in "sph" for init in ("lin", "inv", "real")]


@pytest.mark.parametrize(("letter", "init"), CASES)
@pytest.mark.parametrize("length", [1, 2, 37])
def test_plain_torch_says_the_same(letter: str, init: str, length: int) -> None:
    model = model_of(letter, ssm_init=init)
    mixer, r = model.blocks[0].mixer, residual(length)
    with torch.no_grad():
        want = plain(letter, mixer, r)
        got, _ = mixer(r, Run("torch"))
        assert error(got, want) < 1e-12
        single = model_of(letter, torch.float32, ssm_init=init)
        for a, b in zip(single.parameters(), model.parameters(), strict=True):
            a.copy_(b)
        assert error(single.blocks[0].mixer(r.float(), Run("torch"))[0], want) < 5e-6
        mixer.out_proj.weight[0] *= 1.01  # the comparison can fail
        assert error(mixer(r, Run("torch"))[0], want) > 1e-4


def test_torchs_lstm_and_long_convs_are_the_same() -> None:
    r = residual(50, torch.float32)
    mixer = model_of("l", torch.float32).blocks[0].mixer
    whole = nn.LSTM(M, D, batch_first=True)
    whole.load_state_dict(mixer.lstm.state_dict())
    with torch.no_grad():
        assert torch.equal(mixer(r, Run("torch"))[0], mixer.out_proj(whole(r)[0].reshape(-1, D)).view(2, 50, M))
    for width in (LONG, 70):
        mixer = model_of("g", d_conv=width).blocks[0].mixer
        with torch.no_grad():
            assert error(mixer(r.double(), Run("torch"))[0], plain("g", mixer, r.double())) < 1e-12


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("width", [3, LONG + 1])
def test_recurrent_is_parallel_in_single_precision(letter: str, width: int) -> None:
    model, ids = model_of(letter, torch.float32, layers=2, d_conv=width), ids_of(150)
    with torch.no_grad():
        whole, last = model(ids, return_state=True)
        state, rows = model.initial_state(2), []
        for t in range(150):
            logits, state = model.step(ids[:, t], state)
            rows.append(logits)
    assert error(torch.stack(rows, 1), whole) < 1e-5
    for mine, theirs in zip(state.layers, last.layers, strict=True):
        for name, value in theirs.tensors().items():
            assert error(mine.tensors()[name], value) < 1e-5, name


# ---- hooks


def stepwise(model: HookedMamba, layer: int = 0) -> list[str]:
    return [n for n in model.hook_dict if n.startswith(f"blocks.{layer}.") and spec_of(n).stepwise]


@pytest.mark.parametrize("letter", RECURRENT)
def test_points_in_the_recurrence_show_every_step_in_order_and_reading_changes_no_bit(letter: str) -> None:
    model, ids = model_of(letter, torch.float32, layers=2), ids_of(21)
    names, seen = stepwise(model), []
    with torch.no_grad():
        bits = model(ids)
        _, cache = model.run_with_cache(ids)
        for name in names:
            assert torch.equal(model.run_with_hooks(ids, fwd_hooks=[(f"{name}[5:9:2]", lambda v, hook: v)]), bits)

        def note(value: Tensor, hook: object) -> None:
            seen.append((hook.name, hook.pos, value.clone()))  # type: ignore[attr-defined]

        assert torch.equal(model.run_with_hooks(ids, fwd_hooks=[(n, note) for n in names]), bits)
    for name in names:
        mine = [(pos, value) for n, pos, value in seen if n == name]
        assert [pos for pos, _ in mine] == list(range(21))
        whole = cache[name]
        assert whole.shape[:2] == (2, 21)
        assert error(torch.stack([value for _, value in mine], 1), whole) < 1e-5
    assert cache["h", 0].shape == (2, 21, D) if letter == "l" else (2, 21, D, N)  # hook_h: the layer's own state


@pytest.mark.parametrize("letter", RECURRENT)
def test_an_edited_state_is_what_the_text_goes_on_from(letter: str) -> None:
    model, ids = model_of(letter), ids_of(17)
    names = {"l": {"c": "hook_cell", "h": "hook_hidden"}}.get(letter, {"ssm": "hook_state"})
    with torch.no_grad():
        before, state = model(ids[:, :7], return_state=True)
        edit = {field: torch.randn_like(getattr(state.layers[0], field)) for field in names}
        hooks = [
            (f"blocks.0.mixer.{name}[6]", lambda v, hook, value=edit[field]: value) for field, name in names.items()
        ]
        got = model(ids)
        edited = model.run_with_hooks(ids, fwd_hooks=hooks)
        for field, value in edit.items():
            setattr(state.layers[0], field, value)
        after, _ = model(ids[:, 7:], state=state, return_state=True)
    assert torch.allclose(edited[:, :6], before[:, :6], atol=1e-12)
    assert torch.allclose(edited[:, 7:], after, atol=1e-12)
    assert error(edited[:, 7:], got[:, 7:]) > 1e-3
    assert model.explain_path()[0].form in ("fused", "fft")
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(ids)
        assert model.explain_path()[0].form == "split"


@pytest.mark.parametrize("gate", "ifgo")
def test_a_gate_of_the_lstm_is_edited_where_it_acts(gate: str) -> None:
    model, ids = model_of("l"), ids_of(9)
    mixer, at = model.blocks[0].mixer, 4
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
        seen: dict[str, Tensor] = {}
        hooks = [(f"blocks.0.mixer.hook_{gate}[{at}]", lambda v, hook: torch.zeros_like(v))]
        hooks += [(f"blocks.0.mixer.hook_cell[{at}]", lambda v, hook: seen.update(c=v.clone()))]
        hooks += [(f"blocks.0.mixer.hook_hidden[{at}]", lambda v, hook: seen.update(h=v.clone()))]
        out = model.run_with_hooks(ids, fwd_hooks=hooks)
        value = {n: cache[n, 0][:, at] for n in "ifgo"} | {gate: torch.zeros(2, D, dtype=torch.float64)}
        c = value["f"] * cache["cell", 0][:, at - 1] + value["i"] * value["g"]
        assert torch.allclose(seen["c"], c, atol=1e-13)
        assert torch.allclose(seen["h"], value["o"] * torch.tanh(c), atol=1e-13)
    assert mixer.path.form == "split"
    assert error(out[:, at + 1 :], model(ids)[:, at + 1 :]) > 1e-4


@pytest.mark.parametrize("letter", RECURRENT)
def test_padded_rows_are_addressed_by_their_own_tokens(letter: str) -> None:
    model = model_of(letter)
    rows = [ids_of(11, 1)[0], ids_of(6, 1)[0], ids_of(8, 1)[0]]
    ids, mask = torch.zeros(3, 13, dtype=torch.long), torch.zeros(3, 13, dtype=torch.long)
    for b, (row, left) in enumerate(zip(rows, (2, 0, 5), strict=True)):
        ids[b, left : left + len(row)], mask[b, left : left + len(row)] = row, 1
    name = stepwise(model)[-1]

    def halve(value: Tensor, hook: object) -> Tensor:
        return 0.5 * value

    for site in (f"{name}[-2]", f"{name}[1:3]", ms.at(name, [9, 0, 4])):
        with torch.no_grad():
            with model.hooks(fwd_hooks=[(site, halve)]):
                out, state = model(ids, attention_mask=mask, return_state=True)
            for b, row in enumerate(rows):
                alone = site if isinstance(site, str) else f"{name}[{[9, 0, 4][b]}]"
                with model.hooks(fwd_hooks=[(alone, halve)]):
                    want, end = model(row[None], return_state=True)
                assert torch.allclose(out[b][mask[b].bool()], want[0], atol=1e-12)
                for field, value in end.layers[0].tensors().items():
                    assert torch.allclose(state.layers[0].tensors()[field][b], value[0], atol=1e-12), field
    _, cache = model.run_with_cache(ids, attention_mask=mask)
    for b, row in enumerate(rows):
        _, alone = model.run_with_cache(row[None])
        assert torch.allclose(cache[name][b][mask[b].bool()], alone[name][0], atol=1e-12)


@pytest.mark.parametrize("letter", RECURRENT)
def test_patching_a_state_from_another_text(letter: str) -> None:
    model, name = model_of(letter, layers=2), "hook_cell" if letter == "l" else "hook_state"
    one, other = ids_of(12, 1), ids_of(13, 1)[:, :12]
    with torch.no_grad():
        _, cache = model.run_with_cache(other)
        patch = ms.interventions.patch(f"blocks.1.mixer.{name}[7]", cache)
        out = model.run_with(one, [patch])
        value = cache[f"blocks.1.mixer.{name}"][:, 7]
        want = model.run_with_hooks(one, fwd_hooks=[(f"blocks.1.mixer.{name}[7]", lambda v, hook: value)])
    assert torch.equal(out, want)
    assert error(out[:, 8:], model(one)[:, 8:]) > 1e-5


@pytest.mark.parametrize("letter", "sph")
def test_the_kernel_is_read_and_edited_by_row_and_lag(letter: str) -> None:
    model, ids = model_of(letter), ids_of(10)
    name = "blocks.0.mixer.hook_ssm_kernel"
    with torch.no_grad():
        bits = model(ids)
        _, cache = model.run_with_cache(ids)
        kernel = cache[name]
        assert kernel.shape == (2, 10, D)
        assert torch.equal(model.run_with_hooks(ids, fwd_hooks=[(name, lambda v, hook: v)]), bits)
        y, u = cache["y", 0], cache["x" if letter == "p" else "u", 0]
        last = sum(kernel[:, j] * u[:, 9 - j] for j in range(10))
        assert torch.allclose(y[:, 9], last, atol=1e-12)

        def forget(value: Tensor, hook: object) -> None:
            value[1] = 0  # no tap of row 1

        def no_first(value: Tensor, hook: object) -> Tensor:
            return torch.zeros_like(value)

        seen: list[Tensor] = []
        hooks = [(name, forget), ("blocks.0.mixer.hook_y", lambda v, hook: seen.append(v.clone()))]
        out = model.run_with_hooks(ids, fwd_hooks=hooks)
        assert torch.allclose(out[0], bits[0], atol=1e-12)
        assert not seen[0][1].any()
        hooks[0] = (f"{name}[0]", no_first)  # lag 0
        model.run_with_hooks(ids, fwd_hooks=hooks)
        assert torch.allclose(seen[1], y - kernel[:, :1] * u, atol=1e-12)
        state = model(ids, return_state=True)[1]
        with pytest.raises(HookError, match="goes on from a state"), model.hooks(fwd_hooks=hooks):
            model(ids, state=state)
        with pytest.raises(HookError, match="an edited kernel has no states"):
            model.run_with_hooks(ids, fwd_hooks=[*hooks, ("blocks.0.mixer.hook_state[2]", no_first)])


@pytest.mark.parametrize("letter", RECURRENT)
def test_sweeps_patch_inside_the_recurrence_and_attribution_refuses_it(letter: str) -> None:
    model, clean, corrupted = model_of(letter, layers=2), ids_of(6, 1), ids_of(7, 1)[:, :6]
    tail, metric = "mixer.hook_f" if letter == "l" else "mixer.hook_state", ms.LogitDifference(1, 2)
    found = ms.sweep(model, clean, corrupted, metric, over=tail, progress=False)
    want = []
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        for layer in range(2):
            for t in range(6):
                patch = ms.interventions.patch(f"blocks.{layer}.{tail}[{t}]", cache)
                logits = model.run_with(corrupted, [patch])[0, -1]
                want.append(logits[1] - logits[2])
    assert torch.allclose(torch.as_tensor(found.values).flatten().double(), torch.stack(want), atol=1e-6)
    with pytest.raises(InputError, match=f"{tail} lies inside its layer's recurrence"):
        ms.attribute(model, clean, corrupted, metric, over=tail)


@pytest.mark.parametrize("letter", LETTERS)
def test_gradients_are_cached_where_there_is_one_and_refused_where_they_come_by_steps(letter: str) -> None:
    model, ids = model_of(letter), ids_of(7)
    _, cache = model.run_with_cache(ids, return_type="loss", incl_bwd=True)
    gradients = cache.recording.gradients
    assert "blocks.0.hook_resid_pre_grad" in gradients
    assert not any(name.removesuffix("_grad") in stepwise(model) for name in gradients)
    if letter in "sph":  # the gradient of a kernel, and the states with it
        assert gradients["blocks.0.mixer.hook_ssm_kernel_grad"].shape == (2, 7, D)
        assert cache["h", 0].shape == (2, 7, D, N)
    for name in stepwise(model)[:1]:
        with pytest.raises(HookError, match="comes step by step"):
            model.run_with_cache(ids, names_filter=name, return_type="loss", incl_bwd=True)


def test_a_point_of_another_mixer_is_refused_by_the_layers_own_name() -> None:
    with pytest.raises(UnknownNameError, match="layer 0 is gated convolution and has no mixer.hook_h"):
        model_of("g").add_hook("blocks.0.mixer.hook_h", lambda v, hook: None)
    with pytest.raises(UnknownNameError, match="layer 0 is S4D and has no mixer.hook_delta"):
        model_of("s").add_hook("blocks.0.mixer.hook_delta", lambda v, hook: None)


# ---- gradients, precision, initialisation


@pytest.mark.parametrize("letter", LETTERS)
def test_gradients_are_those_of_plain_torch_also_through_states(letter: str) -> None:
    model, r = model_of(letter), residual(9).requires_grad_()
    mixer = model.blocks[0].mixer
    weight = torch.randn(2, 9, M, dtype=torch.float64)
    leaves = [r, *mixer.parameters()]
    want = torch.autograd.grad((plain(letter, mixer, r) * weight).sum(), leaves)
    got = torch.autograd.grad((mixer(r, Run("torch"))[0] * weight).sum(), leaves)
    first, state = mixer(r[:, :4], Run("torch"))
    rest, _ = mixer(r[:, 4:], Run("torch"), state)
    split = torch.autograd.grad((torch.cat([first, rest], 1) * weight).sum(), leaves)
    for a, b, c in zip(want, got, split, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
        assert torch.allclose(a, c, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("letter", RECURRENT)
def test_gradients_of_a_state_come_back_in_reverse_order(letter: str) -> None:
    model, ids = model_of(letter), ids_of(8)
    name = "blocks.0.mixer." + ("hook_cell" if letter == "l" else "hook_state")
    grads: list[tuple[int, Tensor]] = []
    with model.hooks(bwd_hooks=[(name, lambda g, hook: grads.append((hook.pos, g.clone())))]):
        model(ids, return_type="loss").backward()
    assert [pos for pos, _ in grads] == list(range(7, -1, -1))
    eps, probe = 1e-6, torch.zeros(2, *grads[0][1].shape[1:], dtype=torch.float64)
    probe.view(-1)[3] = eps

    def loss_beside(step: float) -> Tensor:
        return model.run_with_hooks(
            ids, return_type="loss", fwd_hooks=[(f"{name}[2]", lambda v, hook: v + step * probe)]
        )

    with torch.no_grad():
        up, down = loss_beside(1), loss_beside(-1)
    measured = float((up - down) / (2 * eps))
    predicted = float(grads[5][1].view(-1)[3])
    assert measured == pytest.approx(predicted, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("letter", LETTERS)
def test_bf16_keeps_states_and_recurrent_parameters_in_single_precision(letter: str) -> None:
    model, ids = model_of(letter, torch.float32, layers=2), ids_of(40)
    with torch.no_grad():
        want = model(ids)
        low = model.to(torch.bfloat16)
        got, state = low(ids, return_state=True)
        first, middle = low(ids[:, :13], return_state=True)
        rest = low(ids[:, 13:], state=middle)
    assert got.dtype == torch.bfloat16
    assert error(got, want) < 0.05
    assert error(torch.cat([first, rest], 1), got) < 0.05
    single = {"lstm", "ssm"}
    for name, p in low.named_parameters():
        assert p.dtype == (torch.float32 if single & set(name.split(".")) else torch.bfloat16), name
    for name, value in state.layers[0].tensors().items():
        assert value.dtype == (torch.bfloat16 if name == "conv" else torch.float32)


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_folder_keeps_every_bit_and_dtype(letter: str, dtype: str, tmp_path: Path) -> None:
    model, ids = model_of(letter, getattr(torch, dtype), layers=2), ids_of(9)
    save_model(model, tmp_path / "model")
    again = ms.load(tmp_path / "model", dtype=dtype)
    assert torch.equal(again(ids), model(ids))
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_initialisation_follows_the_papers() -> None:
    torch.manual_seed(0)
    cfg = MambaConfig(d_model=32, n_layers=1, d_vocab=V, d_state=8, pattern="s")
    for init in ("lin", "inv", "real"):
        ssm = HookedMamba(cfg.with_pattern("s", ssm_init=init)).blocks[0].mixer.ssm
        delta = ssm.log_dt.detach().exp()
        assert 1e-3 <= float(delta.min()) < 2e-3 and 0.05 < float(delta.max()) <= 0.1
        if init == "real":
            assert torch.allclose(ssm.A_log.exp(), torch.arange(1.0, 9).expand(64, 8))
            continue
        assert torch.allclose(ssm.A_log.exp(), torch.full((64, 4), 0.5))
        lin = [0, math.pi, 2 * math.pi, 3 * math.pi]
        inv = [8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)]
        assert torch.allclose(ssm.A_imag[3], torch.tensor(lin if init == "lin" else inv))
    lstm = HookedMamba(cfg.with_pattern("l")).blocks[0].mixer.lstm
    _, _, b, c = (w.detach() for w in lstm.all_weights[0])
    assert bool((b + c)[64:128].eq(1).all()) and float((b + c)[:64].abs().max()) < 2 / 8
    assert lstm.training and HookedMamba(cfg.with_pattern("l")).eval().blocks[0].mixer.lstm.training


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"pattern": "s", "ssm_init": "legs"}, "ssm_init must be one of lin, inv, real, got 'legs'"),
        ({"pattern": "l", "ssm_init": "lin"}, "ssm_init='lin' is an option of S4D, plain S4D, H3"),
        ({"pattern": "h", "d_state": 7}, "d_state=7 must be even with ssm_init='lin'"),
        ({"pattern": "g", "window": 4}, "window=4 is an option of sliding-window attention"),
    ],
)
def test_contradictory_options_are_refused_by_name(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MambaConfig(d_model=32, n_layers=2, d_vocab=V, **fields)  # type: ignore[arg-type]
    assert MambaConfig(d_model=32, n_layers=2, d_vocab=V, pattern="h", d_state=7, ssm_init="real").d_state == 7


def test_training_times_the_recurrence_and_never_decays_a_rate() -> None:
    settings = TrainSettings(steps=2, batch=2, length=8, lr=1e-3, weight_decay=0.1)
    for letter in LETTERS:
        model = model_of(letter, torch.float32)
        floor = measure_floor(model, 2, 8)
        assert (floor.cores > 0) == (letter != "g") and floor.scans == 0
        free = {id(p) for p in make_optimizer(model, settings).param_groups[1]["params"]}
        rates = [p for n, p in model.named_parameters() if n.endswith(("A_log", "A_imag", "log_dt", "ssm.D"))]
        assert all(id(p) in free for p in rates) and len(rates) == (4 if letter in "sph" else 0)
        assert id(model.blocks[0].mixer.out_proj.weight) not in free


def test_an_exchanged_part_is_refused_rather_than_ignored() -> None:
    model, ids = model_of("l"), ids_of(5)
    handle = model.blocks[0].mixer.lstm.register_forward_hook(lambda *_: None)
    with pytest.raises(HookError, match="hook hook_cell or hook_hidden"):
        model(ids)
    handle.remove()
    model(ids)
    model = model_of("h")
    model.blocks[0].mixer.shift.register_forward_hook(lambda *_: None)
    with pytest.raises(HookError, match=r"hook_shift: .* hook hook_in_k .* or hook_shift"):
        model(ids)
