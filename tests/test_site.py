"""The documentation site in a real browser: its search finds the right page first, and its pages are accessible.

The second needs axe-core: ``npm pack axe-core`` and ``EGGROLL_TEST_AXE=package/axe.min.js``.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import Page, browser, executable

pytest.importorskip("zensical")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(executable() is None, reason="no Chromium")]

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
AXE = os.environ.get("EGGROLL_TEST_AXE", "")

# What is typed, and where the first result leads.
GUIDES = {
    "sigma": "user-guide/choosing-settings/#sigma-and-the-learning-rate",
    "resume": "user-guide/advanced-usage/#save-and-resume-a-run",
    "Ray": "user-guide/many-machines/#ray",
    "BatchNorm": "user-guide/fitness-functions/#batchnorm-and-dropout",
    "padding": "user-guide/questions/#what-happens-to-padding",
    "reproducibility": "user-guide/advanced-usage/#reproducibility",
    "RayEngine": "api/distributed/#eggroll_trainer.distributed.ray_engine.RayEngine",
}
# What is typed, and a question among the first three results.
QUESTIONS = {
    "reproducible": "is-a-run-reproducible",
    "layer noise": "do-layers-of-the-same-shape-get-the-same-noise",
    "seed": "what-does-seed-cover",
    "resume": "how-do-i-resume-a-run",
    "minimize": "does-it-minimise-or-maximise",
    "naming": "naming-what-are-eggroll-a-member-the-centre",
    ".item()": "may-i-call-item-branch-and-loop-in-the-fitness-function",
    "memory": "how-much-memory-does-it-take",
    "conventions": "which-conventions-do-sigma-and-the-learning-rate-follow",
    "Ray": "do-i-need-ray",
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Build the site, serve it, and yield its address."""
    subprocess.run([sys.executable, "-m", "zensical", "build", "--clean"], cwd=ROOT, check=True, capture_output=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def page() -> Iterator[Page]:
    # A new browser for each test: the site remembers whether it was light or dark.
    with browser() as page:
        yield page


# Open the search, which lives in a shadow tree, and type into it.
TYPE = """
(() => {
    const roots = [...document.querySelectorAll("*")].map(element => element.shadowRoot);
    window.search = roots.find(root => root?.querySelector("input[role=combobox]"));
    if (!window.search) return void document.querySelector(".md-search__button")?.click();
    const input = window.search.querySelector("input[role=combobox]");
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(input, %s);
    return input.dispatchEvent(new Event("input", {bubbles: true}));
})()
"""
RESULTS = """[...window.search.querySelectorAll("a[role=option]")].map(option => option.href)"""


def search(page: Page, address: str, typed: str) -> list[str]:
    """Return where the results lead."""
    page.look(1280, 800)
    page.open(address)
    page.wait(TYPE % json.dumps(typed))
    return [result.removeprefix(address) for result in page.wait(RESULTS)]


def without_query(link: str) -> str:
    path, _, anchor = link.partition("#")
    return path.partition("?")[0] + "#" + anchor


@pytest.mark.parametrize("typed", GUIDES)
def test_search_finds_the_guide_first(page: Page, address: str, typed: str) -> None:
    results = [without_query(link) for link in search(page, address, typed)]
    assert results[0] == GUIDES[typed], results


@pytest.mark.parametrize("typed", QUESTIONS)
def test_search_finds_the_question(page: Page, address: str, typed: str) -> None:
    results = [without_query(link) for link in search(page, address, typed)]
    assert "user-guide/questions/#" + QUESTIONS[typed] in results[:3], results


@pytest.mark.skipif(not AXE, reason="EGGROLL_TEST_AXE does not name axe-core's file")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_accessibility(page: Page, address: str, width: int, dark: bool) -> None:
    page.look(width, 844, dark=dark)
    source = Path(AXE).read_text()
    serious = []
    pages = sorted(path.relative_to(SITE) for path in SITE.rglob("*.html"))
    assert len(pages) > 50
    for path in pages:
        page.open(address + str(path))
        page.wait("performance.getEntriesByType('navigation')[0]?.loadEventEnd")
        assert page.evaluate("document.body.dataset.mdColorScheme") == ("slate" if dark else "default")
        page.evaluate(source + "; undefined")
        found = page.evaluate("axe.run(document).then(found => JSON.stringify(found.violations))")
        for violation in json.loads(found):
            if violation["impact"] in ("serious", "critical"):
                serious += [f"{path}: {violation['id']}: {node['target']}" for node in violation["nodes"]]
    assert not serious, "\n".join(serious)
