"""The page in a real browser, with no network: it draws, and the console stays silent."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mambascope.analyses import scope

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; the page itself is checked without one")
def test_the_page_draws_offline(speaking, tmp_path: Path) -> None:
    path = scope(speaking, "a <script>alert(1)</script> & more" * 40).save(tmp_path / "page.html")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [
        "--virtual-time-budget=20000",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert re.search(r'<html[^>]*data-ready="true"', done.stdout), done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    for name in ("delta", "norm", "lens", "sources", "relevance"):
        drawn = done.stdout.split(f'id="plot-{name}"')[1].split("</section>")[0]
        assert "heatmaplayer" in drawn
        assert "<image" in drawn
    assert done.stdout.count("<script") == 4


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; the page itself is checked without one")
def test_the_check_can_fail(speaking, tmp_path: Path) -> None:
    page = scope(speaking, "abc").html().replace('"use strict";', "throw new Error('broken');")
    path = tmp_path / "page.html"
    path.write_text(page, "utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    command += [
        "--virtual-time-budget=5000",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert not re.search(r'<html[^>]*data-ready="true"', done.stdout)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line]
