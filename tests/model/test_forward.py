"""What forward takes and gives, and how it refuses."""

import gc
import os
import subprocess
import sys
import tracemalloc

import pytest
import torch
from torch.nn import functional as F

from mambascope.errors import BackendError, InputError
from mambascope.model import HookedMamba, graphs
from tests.conftest import error, make_model


def test_return_types(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        logits = model(tokens)
        per_token = F.cross_entropy(logits[:, :-1].reshape(-1, 50), tokens[:, 1:].reshape(-1), reduction="none")
        assert error(model(tokens, return_type="loss"), per_token.mean()) < 1e-6
        assert error(model(tokens, return_type="loss", loss_per_token=True), per_token.view(2, 69)) < 1e-5
        both = model(tokens, return_type="both")
        assert torch.equal(both.logits, logits)
        assert error(both.loss, per_token.mean()) < 1e-6
        assert model(tokens, return_type=None) is None
        assert torch.equal(model(tokens[0]), model(tokens[:1]))
        for keep in (1, 5, 70):
            assert error(model(tokens, logits_to_keep=keep), logits[:, -keep:]) < 1e-6


def test_layers_can_be_left_out(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        for layer in (0, 1, 2):
            resid = model(tokens, stop_at_layer=layer)
            assert torch.equal(resid, cache["resid_pre", layer])
            assert error(model(resid, start_at_layer=layer), logits) < 1e-6
        assert torch.equal(model(tokens, stop_at_layer=3), cache["resid_post", 2])
        assert torch.equal(model(tokens, stop_at_layer=-1), cache["resid_pre", 2])
        assert torch.equal(model(cache["resid_pre", 1], start_at_layer=1, stop_at_layer=2), cache["resid_pre", 2])
        for options in ({"start_at_layer": 3}, {"start_at_layer": 4}, {"stop_at_layer": 9}, {"stop_at_layer": True}):
            with pytest.raises(InputError, match="_at_layer"):
                model(cache["resid_pre", 1] if "start_at_layer" in options else tokens, **options)
        with pytest.raises(InputError, match="residual stream"):
            model(tokens, start_at_layer=1)
        with pytest.raises(InputError, match="before start_at_layer"):
            model(cache["resid_pre", 1], start_at_layer=2, stop_at_layer=1)
        with pytest.raises(InputError, match="loss needs tokens"):
            model(cache["resid_pre", 1], start_at_layer=1, return_type="loss")
        with pytest.raises(InputError, match="whole model"):
            model(tokens, stop_at_layer=1, return_state=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([[1, 50]]), r"tokens\[0, 1\] is 50, outside the vocabulary of 50 tokens"),
        (torch.tensor([[-1, 3]]), r"tokens\[0, 0\] is -1"),
        (torch.ones(1, 3), "integer ids"),
        (torch.ones(1, 3, dtype=torch.bool), "integer ids"),
        (torch.ones(1, 3, 3, dtype=torch.long), r"shape \(batch, length\), got \(1, 3, 3\)"),
        (torch.ones(1, 0, dtype=torch.long), "empty"),
        (torch.tensor(3), "shape"),
        ([], "empty"),
        (None, "got NoneType"),
        (3.5, "got float"),
        ("text", "has no tokenizer"),
    ],
)
def test_bad_tokens_are_refused(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_model()(value)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1, 1]], "hole in row 0"),
        ([[0, 1, 0, 1]], "hole in row 0"),
        ([[0, 0, 0, 0]], "hides every token of row 0"),
        ([[1, 2, 1, 1]], "only 0 and 1"),
        ([[1, 1, 1]], "tokens' shape"),
    ],
)
def test_bad_masks_are_refused(mask: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_model()(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.tensor(mask))


def test_bad_options_are_refused(tokens: torch.Tensor) -> None:
    model = make_model()
    for options, message in (
        ({"return_type": "logit"}, "return_type"),
        ({"logits_to_keep": 0}, "positive integer"),
        ({"logits_to_keep": 71}, "exceeds the 70 tokens"),
        ({"prepend_bos": True}, "goes with text"),
    ):
        with pytest.raises(InputError, match=message):
            model(tokens, **options)
    with pytest.raises(InputError, match="two tokens"):
        model(tokens[:, :1], return_type="loss")
    with pytest.raises(BackendError, match="fast"):
        model.backend = "fast"


def test_triton_without_a_gpu_says_why() -> None:
    # In a process of its own: the tests of the Triton kernels switch its interpreter on, which runs on the CPU.
    code = (
        "import torch, mambascope as ms\n"
        "model = ms.load('induction-2l', device='cpu')\nmodel.backend = 'triton'\n"
        "try:\n    model(torch.ones(1, 3, dtype=torch.long))\nexcept Exception as error:\n"
        "    print(type(error).__name__, error)"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert out.startswith("BackendError")
    assert "triton" in out


def test_long_texts_run_in_pieces_with_the_same_numbers(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(backend=backend)
    tokens = torch.randint(0, 50, (2, 101), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, state = model(tokens, return_state=True)
        loss = model(tokens, return_type="loss", loss_per_token=True)
        last = model(tokens, logits_to_keep=40)
        monkeypatch.setattr(graphs, "_PIECE", 64)
        monkeypatch.setattr(graphs, "_PIECE_WIDTH", 1)
        pieces, end = model(tokens, return_state=True)
        assert error(pieces, whole) < 5e-6
        assert error(end.ssm, state.ssm) < 5e-6
        assert error(model(tokens, return_type="loss", loss_per_token=True), loss) < 5e-6
        assert error(model(tokens, logits_to_keep=40), last) < 5e-6
        with pytest.raises(InputError, match="from 1 to the 101 tokens"):
            model(tokens, logits_to_keep=102)


def test_the_loss_never_holds_length_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(d_vocab=500)
    tokens = torch.randint(0, 500, (1, 400), generator=torch.Generator().manual_seed(1))
    rows: list[int] = []
    model.unembed.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    plain = model(tokens, return_type="loss")
    gradient = torch.autograd.grad(plain, model.embed.weight)[0]
    monkeypatch.setattr("mambascope.ops.loss._HELD", {"cpu": 50 * 500 * 4})
    rows.clear()
    loss = model(tokens, return_type="loss")
    assert error(torch.autograd.grad(loss, model.embed.weight)[0], gradient) < 1e-5
    assert error(loss, plain) < 1e-6
    assert max(rows) == 50


def test_logits_that_cannot_fit_are_refused_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(d_vocab=50_000)
    monkeypatch.setattr("mambascope.memory.available_bytes", lambda device: 50_000_000)
    tokens = torch.zeros(1, 400, dtype=torch.long)
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"logits of 400 tokens x 50,000 would take 80.0 MB .* logits_to_keep"),
    ):
        model(tokens)
    with torch.no_grad():
        assert model(tokens, return_type="loss").isfinite()
        assert model(tokens, logits_to_keep=1).shape == (1, 1, 50_000)


def test_generation(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        out = model.generate(tokens[:, :10], 20)
        assert torch.equal(out[:, :10], tokens[:, :10])
        assert torch.equal(model(out)[:, 9:-1].argmax(-1), out[:, 10:])
        options = {"temperature": 1.0, "top_k": 10, "top_p": 0.9}
        a, b, c = (model.generate(tokens[:, :10], 20, seed=s, **options) for s in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        stop = int(out[0, 12])
        stopped = model.generate(tokens[:1, :10], 20, stop_tokens=[stop])
        assert torch.equal(stopped[0], out[0, : 10 + (out[0, 10:] == stop).nonzero()[0, 0] + 1])
        assert [int(t) for t in model.stream(tokens[:1, :10], 5)] == out[0, 10:15].tolist()
        ragged, mask = torch.zeros(2, 10, dtype=torch.long), torch.zeros(2, 10)
        ragged[0, :4], mask[0, :4] = tokens[0, :4], 1
        ragged[1, 3:10], mask[1, 3:10] = tokens[1, :7], 1
        rows = model.generate(ragged, 6, attention_mask=mask)
        assert torch.equal(rows[0], model.generate(tokens[:1, :4], 6)[0])
        assert torch.equal(rows[1], model.generate(tokens[1:, :7], 6)[0])
        assert model.generate(tokens[:, :3], 0).shape == (2, 3)


def test_generation_with_hooks_and_cache(model: HookedMamba, tokens: torch.Tensor) -> None:
    seen: list[int] = []
    with torch.no_grad():
        plain = model.generate(tokens[:1, :10], 8)
        with model.hooks(fwd_hooks=[("blocks.1.mixer.hook_h[12:15]", lambda h, hook: seen.append(hook.pos))]):
            assert torch.equal(model.generate(tokens[:1, :10], 8), plain)
        assert seen == [12, 13, 14]
        edit = ("blocks.1.mixer.hook_h[12]", lambda h, hook: h + 3)
        with model.hooks(fwd_hooks=[edit]):
            edited, cache = model.generate(tokens[:1, :10], 8, return_cache=True)
            assert torch.equal(model(edited[:, :-1])[:, 9:].argmax(-1), edited[:, 10:])
            _, once = model.run_with_cache(edited[:, :-1])
        assert torch.equal(edited[:, :13], plain[:, :13])
        for name in once:
            a, b = (c[name] if isinstance(c[name], torch.Tensor) else c[name].full() for c in (cache, once))
            assert error(a, b) < 5e-6, name
        with (
            pytest.raises(Exception, match="negative positions"),
            model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre[-1]", lambda v, hook: None)]),
        ):
            model.generate(tokens[:1, :10], 2)
        _, cache = model.generate(tokens[:1, :10], 8, return_cache=True)
        assert cache["h", 1].shape[1] == 17


def test_bad_generation_options_are_refused(tokens: torch.Tensor) -> None:
    model = make_model()
    for options, message in (
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"stop_tokens": [50]}, "stop token 50"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(tokens, **options)
    with pytest.raises(InputError, match="one token a row"):
        model.step(tokens)


def test_generation_takes_constant_memory() -> None:
    model = make_model()
    gc.collect()
    tracemalloc.start()
    sizes = []
    for i, _ in enumerate(model.stream(torch.ones(1, 5, dtype=torch.long), 600)):
        if i in (99, 599):
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 200_000


def test_the_normalised_residual_is_what_the_unembedding_reads(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        for keep in (None, 3):
            normed = model(tokens, return_type="normed", logits_to_keep=keep)
            assert normed.shape == (*tokens.shape[:1], keep or tokens.shape[1], model.cfg.d_model)
            assert torch.equal(model.unembed(normed), model(tokens, logits_to_keep=keep))
    with pytest.raises(InputError, match="'both', 'normed' or None, got 'norm'"):
        model(tokens, return_type="norm")


def test_the_loss_of_a_padded_batch_with_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(backend="torch")
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    names, leaves = zip(*model.named_parameters(), strict=True)

    def both() -> list[torch.Tensor]:
        loss = model(tokens, return_type="loss", attention_mask=mask)
        return [loss, *torch.autograd.grad(loss, leaves)]

    found = both()
    monkeypatch.setattr("mambascope.model.language_model.loss_of", lambda *_: None)
    for name, a, b in zip(("loss", *names), found, both(), strict=True):
        assert error(a, b) < 2e-6, name
    model(tokens, return_type="loss").backward()
    assert error(leaves[0].grad, found[1]) > 1e-2
