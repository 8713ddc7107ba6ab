"""Ctrl-C at any moment leaves the last whole generation, from which training goes on."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

import pytest
import torch
from helpers import (
    assert_same,
    fitness,
    goes_on,
    make,
    network,
    population_fitness,
    start_python,
)
from torch import Tensor, nn

from eggroll_trainer.interrupts import delayed_interrupt


class Interrupting(torch.optim.Adam):
    """Sends a Ctrl-C to the process in the middle of its second step."""

    fails = False
    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGINT)
            if self.fails:
                raise RuntimeError("as well")
        return super().step()


def test_ctrl_c_in_the_update_waits_for_its_end() -> None:
    trainer, twin = make(optimizer=Interrupting), make()
    with pytest.raises(KeyboardInterrupt):
        trainer.train(5, verbose=False)
    assert trainer.generation == 2 and len(trainer.history["fitness"]) == 2
    twin.train(2, verbose=False)
    assert torch.equal(trainer.current_params, twin.current_params) and trainer.history == twin.history
    for _ in range(2):
        assert trainer.step() == twin.step()


def test_ctrl_c_in_an_update_that_fails() -> None:
    class Both(Interrupting):
        fails = True

    trainer, twin = make(optimizer=Both), make()
    trainer.step()
    twin.step()
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.step()
    # Neither is lost.
    assert isinstance(caught.value.__context__, RuntimeError)
    for _ in range(2):
        assert trainer.step() == twin.step()


@pytest.mark.parametrize("form", [fitness, population_fitness], ids=["plain", "batched"])
def test_ctrl_c_in_a_batched_forward_waits_for_its_end(form: Any) -> None:
    """There it would leave the members' weights in the model, and torch's transforms on."""

    class Pressing(nn.Module):
        times: list[str] = []

        def forward(self, x: Tensor) -> Tensor:
            self.times.append("begun")
            if trainer.generation == 1:
                os.kill(os.getpid(), signal.SIGINT)
            self.times.append("ended")
            return x

    trainer, twin = make(model=network().append(Pressing()), fitness_fn=form), make(fitness_fn=form)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(3, verbose=False)
    count = len(Pressing.times) // 2
    assert Pressing.times == ["begun", "ended"] * count and count > 0 and trainer.generation == 1
    trainer.model[-1] = nn.Identity()
    twin.step()
    for _ in range(2):
        assert trainer.step() == twin.step()


def test_ctrl_c_that_is_ignored_or_handled_otherwise() -> None:
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.SIG_IGN, lambda number, frame: seen.append(number)):
            signal.signal(signal.SIGINT, handler)
            make(optimizer=Interrupting).train(3, verbose=False)
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_a_second_ctrl_c_does_not_wait() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), delayed_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(2)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_trains_in_a_thread() -> None:
    trainer, twin = make(), make()
    thread = threading.Thread(target=trainer.train, args=(2, False))
    thread.start()
    thread.join()
    twin.train(2, verbose=False)
    goes_on(trainer, twin)


def train_under_fire() -> None:
    """Run in a process of its own: train while somebody presses Ctrl-C, and compare with a quiet run."""
    generations, interrupts = 150, 0
    for form in (fitness, population_fitness):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        trainer, twin = make(fitness_fn=form), make(fitness_fn=form)
        twin.train(generations, verbose=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        while True:
            try:
                print("ready", flush=True)
                trainer.train(generations - trainer.generation, verbose=False)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                break
            except KeyboardInterrupt:
                interrupts += 1
                assert len(trainer.history["fitness"]) == trainer.generation
                assert torch.is_grad_enabled() and torch._C._len_torch_function_stack() == 0
        assert_same(trainer.state_dict(), twin.state_dict())
    print("interrupts", interrupts)


def test_ctrl_c_at_any_moment_leaves_the_last_whole_generation() -> None:
    delays = random.Random(0)
    with start_python("test_interrupts.train_under_fire") as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line == "ready\n":
                time.sleep(delays.uniform(0.005, 0.05))
                process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert int(line.removeprefix("interrupts ")) >= 10
