"""The page: complete in itself, escaped whatever the text says, the same bytes twice, written whole or not at all."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mambascope.analyses import scope
from mambascope.analyses.report import _POLICY, page
from mambascope.errors import InputError

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror='a'> \"q\" & \0 \u202e naïve 日本 <b>\n\n\tend"


class Page(HTMLParser):
    """Tags, attributes, the scripts' contents and the visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = (dict(attrs).get("id") or str(len(self.tags))) if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._script = None


@pytest.fixture(scope="module")
def overview(speaking):
    return scope(speaking, HOSTILE)


@pytest.fixture(scope="module")
def html(overview) -> str:
    return page(overview)


def test_the_overview_holds_together(speaking, overview) -> None:
    with torch.no_grad():
        loss = float(speaking(HOSTILE, return_type="loss"))
    length = len(HOSTILE.encode())
    assert overview.about["tokens"] == length
    assert overview.about["mean_loss"] == pytest.approx(loss, abs=1e-4)
    assert overview.sources.amount.shape == (3, length)
    assert overview.table().shape == (length, 3 + 10 + 2)
    plain = overview.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert [t["id"] for t in plain["tokens"]] == speaking.to_tokens(HOSTILE)[0].tolist()
    assert plain["tokens"][0]["loss"] is None
    assert plain["tokens"][3]["delta"] == pytest.approx(float(overview.gating.delta[:, 3].mean()))
    assert len(plain["layers"]["state_norm"]) == 3


def test_the_page_needs_nothing_but_itself(html: str) -> None:
    found = Page(html)
    for tag, attributes in found.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, name, value)
    policies = [a.get("content") for t, a in found.tags if t == "meta" and a.get("http-equiv")]
    assert policies == [_POLICY]
    assert "default-src 'none'" in _POLICY
    assert "http" not in _POLICY
    assert "@import" not in html[: html.index("</style>")]
    assert "url(" not in html[: html.index("</style>")]
    assert html.count("plotly.js v") == 1
    assert html.index("Content-Security-Policy") < html.index("<script")


def test_no_text_becomes_markup(html: str, overview) -> None:
    found = Page(html)
    assert [a.get("id") for t, a in found.tags if t == "script"] == ["data", "figures", None, None]
    assert not [t for t, _ in found.tags if t in ("img", "b", "iframe")]
    assert not [n for _, a in found.tags for n in a if n.startswith("on")]
    assert "\0" not in html
    assert "\u202e" not in html
    for part in ("data", "figures"):
        assert "<" not in found.scripts[part]
    data = json.loads(found.scripts["data"])
    assert "".join(data["names"]).startswith("</script><script>alert(1)</script><!--·<img")
    assert len(data["names"]) == len(overview.labels)
    assert {m["title"] for m in data["metrics"].values()} == {"Loss", "Delta", "State norm"}
    figures = json.loads(found.scripts["figures"])
    assert [f["name"] for f in figures] == ["delta", "norm", "lens", "sources", "relevance"]
    for figure in figures:
        for line in figure["data"][0]["customdata"]:
            for cell in line:  # plotly reads a small HTML: only our own marks may be in it
                assert set(re.findall(r"<[^>]*>", cell)) <= {"<b>", "</b>", "<br>"}
                assert cell.count("<b>") == 1
    strip = "</script><script>alert(1)</script><!-- <img src=x onerror='a'> \"q\" & ␀ \\u202e "
    assert strip.replace("\\u202e", "\ufffd" * 3) in found.text  # all there to read (a token here is a byte)


def test_numbers_on_the_page_are_the_overview_s(html: str, overview) -> None:
    data = json.loads(Page(html).scripts["data"])
    loss = overview.predictions.loss.tolist()
    assert data["metrics"]["loss"]["values"][0] is None
    assert data["metrics"]["loss"]["values"][5] == pytest.approx(loss[5], rel=1e-4)
    assert all(0 <= s <= 1 for m in data["metrics"].values() for s in m["shade"])
    assert f"{overview.about['mean_loss']:.3f}" in html
    assert html.count("<tr>") == 1 + len(overview.labels)
    assert "torch 2" in html
    assert "mambascope 0" in html


def test_the_best_guess_is_traced_back(html: str, overview, speaking) -> None:
    found = overview.relevance
    assert found.target.value == pytest.approx(float(speaking(HOSTILE).detach()[0, -1].max()), rel=1e-4)
    assert f", {found.target.value:.2f}, traced back" in Page(html).text
    figure = json.loads(Page(html).scripts["figures"])[-1]["data"][0]
    assert figure["zmin"] == -figure["zmax"]
    plain = overview.to_dict()["relevance"]
    assert plain["stream"] == found.stream.tolist()
    assert plain["target"]["query"] == len(overview.labels) - 1


def test_what_cannot_be_traced_is_said(speaking) -> None:
    with speaking.hooks(fwd_hooks=[("blocks.1.mixer.hook_gated", lambda v, hook: 2 * v)]):
        _, cache = speaking.run_with_cache("some <text>")
    found = scope(speaking, cache)
    assert found.relevance is None
    assert "a hook edited mixer.hook_gated at position 0" in Page(page(found)).text
    assert set(found.figures()) == {"delta", "state norm", "logit lens", "sources"}
    assert found.to_dict()["relevance"] == {"untraced": found.untraced}


def test_same_overview_same_bytes(html: str, overview) -> None:
    assert page(overview) == html


def test_a_page_of_a_long_text_says_what_it_shows(speaking) -> None:
    found = scope(speaking, "abcdefghij" * 130, max_tokens=1100)
    text = Page(page(found)).text
    assert (
        "The text has 1,300 tokens. The first 200 were read and live on in the state; the last 1,100 are shown" in text
    )
    assert text.count("Each cell shows the largest of 2 neighbouring tokens.") == 5
    assert "The state before the first token shown adds" in text


def test_tokens_alone_make_a_page_too(random) -> None:
    found = scope(random, torch.tensor([[5]]), top=3)
    text = page(found)
    assert "[5]" in text
    assert math.isnan(found.predictions.mean_loss)
    assert found.to_dict()["about"]["mean_loss"] is None


def test_another_query(speaking) -> None:
    found = scope(speaking, "abcdef", query=2)
    assert found.sources.labels == ("a", "b", "c")
    assert "What token 2 reads" in page(found)
    with pytest.raises(InputError, match="query 6 is outside the text of 6 tokens"):
        scope(speaking, "abcdef", query=6)


def test_saving(overview, tmp_path: Path) -> None:
    path = overview.save(tmp_path / "page.html")
    assert path.read_text("utf-8").startswith("<!doctype html>")
    with pytest.raises(InputError, match=r"cannot be written to .*nowhere"):
        overview.save(tmp_path / "nowhere" / "page.html")
    with pytest.raises(InputError, match="is a folder"):
        overview.save(tmp_path)


def test_an_old_page_stays_whole_when_writing_fails(overview, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mambascope.storage.os.fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        overview.save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
