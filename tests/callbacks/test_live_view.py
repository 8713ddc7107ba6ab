"""TensorBoard as the live view of a run: a real server, read by a real browser, while the run goes on."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import browser, executable
from launching import environment, start

pytest.importorskip("tensorboard")

SCRIPT = """
import sys, time, torch
from torch import nn
from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.callbacks import TensorBoard

torch.manual_seed(0)
x = torch.randn(64, 4)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
trainer = EGGROLLTrainer(
    model=model,
    fitness_fn=lambda model: -(model(x) - x[:, :1] * x[:, 1:2]).square().mean().item(),
    population_size=64,
    learning_rate=0.1,
    noise_reuse=2,
    seed=0,
)
trainer.train(10**6, verbose=False, callback=[TensorBoard(sys.argv[1]), lambda *_: time.sleep(0.2)])
"""

# What the page shows: points of the curve, and histograms.
POINTS = """
Math.max(0, ...[...document.querySelectorAll("scalar-card line-chart path")]
    .filter(path => !path.closest("mat-icon")).map(path => path.getAttribute("d").split("L").length))
"""
HISTOGRAMS = 'document.querySelectorAll("histogram-card g.histogram").length'

# As a click on "Reload data" in its settings does; every 30 seconds, which is what it takes then.
RELOADS = "localStorage.setItem('_tb_global_settings', JSON.stringify({autoReload: true}))"


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """Start TensorBoard's server, and yield its address."""
    options = ("--logdir", folder, "--port", "0", "--host", "localhost", "--reload_interval", "1")
    command: list[str | Path] = [sys.executable, "-m", "tensorboard.main", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stderr is not None
        try:
            found = (re.search(r"http://\S+", line) for line in process.stderr)
            yield next(match[0] for match in found if match)
        finally:
            process.terminate()
            process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(executable() is None, reason="there is no Chromium, whose command is chromium or google-chrome")
def test_curve_and_histogram_gain_points_without_reload(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with start(script, tmp_path / "run") as run, server(tmp_path / "run") as address, browser() as page:
        page.run_first(RELOADS)
        page.open(f"{address}?tagFilter=mean_fitness%7Cscores&smoothing=0#timeseries")
        points = page.wait(POINTS, lambda value: value >= 3)
        histograms = page.wait(HISTOGRAMS, lambda value: value >= 3)
        page.evaluate("window.same = 'page'")
        page.wait(POINTS, lambda value: value > points + 5, seconds=120)
        # It shows the last of 50 or so at the most.
        page.wait(HISTOGRAMS, lambda value: value > histograms or histograms >= 50)
        assert page.evaluate("window.same") == "page" and run.poll() is None
        page.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText.includes('Settings')).click()")
        page.wait("document.body.innerText.includes('Card Width')", lambda shown: not shown)
        page.screenshot(tmp_path / "tensorboard.png")
    assert (tmp_path / "tensorboard.png").stat().st_size > 20_000
