"""Ctrl-C at any moment leaves the last whole generation, from which training goes on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
import weakref
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

from eggroll_trainer._utils.interrupts import (
    TimeLimitExceeded,
    check_pending,
    delayed_interrupt,
    interruptible,
    time_limit,
)
from eggroll_trainer.distributed import LocalEngine


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


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


class Lossy:
    """Takes time where an exception is lost."""

    def __del__(self) -> None:
        busy(0.15)


def test_a_time_limit_that_is_swallowed_comes_again() -> None:
    swallowed = 0
    with pytest.raises(TimeLimitExceeded), time_limit(0.02):
        while swallowed < 3:
            try:
                busy(5)
            except BaseException:
                swallowed += 1
        busy(5)
    assert swallowed == 3


def test_a_time_limit_that_is_swallowed_for_good_is_told_at_the_end() -> None:
    with pytest.raises(TimeLimitExceeded), time_limit(0.02):
        try:
            busy(5)
        except BaseException:
            score = -1.0
    assert score == -1.0


def test_a_time_limit_that_is_made_into_another_exception_is_told() -> None:
    with pytest.raises(TimeLimitExceeded) as caught, time_limit(0.02):
        try:
            busy(5)
        except BaseException as error:
            raise ValueError("no score") from error
    assert isinstance(caught.value.__cause__, ValueError)
    # Another exception is not its doing.
    with pytest.raises(ValueError, match="no model"), time_limit(0.02):
        with contextlib.suppress(TimeLimitExceeded):
            busy(5)
        raise ValueError("no model")


@pytest.mark.parametrize("way", ["time limit", "ctrl-c"])
def test_what_comes_while_an_exception_would_be_lost_is_not(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    limited = way == "time limit"
    with (
        pytest.raises(TimeLimitExceeded if limited else KeyboardInterrupt),
        interruptible(),
        time_limit(0.02 if limited else None),
    ):
        if not limited:
            threading.Timer(0.02, signal.raise_signal, [signal.SIGINT]).start()
        Lossy()
        busy(5)
    assert not lost


def test_an_exception_that_was_lost_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)

    class Press:
        pass

    def press(reference: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), interruptible():
        pressing = Press()
        reference = weakref.ref(pressing, press)
        del pressing
        busy(5)
    assert not lost and reference() is None
    # Also where nothing of the user's comes after it.
    with pytest.raises(KeyboardInterrupt), interruptible():
        pressing = Press()
        reference = weakref.ref(pressing, press)
        del pressing
    assert not lost


def test_ctrl_c_that_the_user_catches_is_the_users() -> None:
    reached = []
    with interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
            busy(1)
        except KeyboardInterrupt:
            reached.append(1)
        busy(0.2)
        check_pending()
    assert reached == [1]


@pytest.mark.parametrize("way", ["time limit", "ctrl-c"])
def test_the_end_of_a_context_manager_is_not_interrupted(way: str) -> None:
    done = []

    class Careful:
        def __enter__(self) -> None:
            busy(0.1)
            done.append("entered")

        def __exit__(self, *_: object) -> None:
            busy(0.1)
            done.append("left")

    @contextlib.contextmanager
    def careful() -> Any:
        with Careful():
            yield
        busy(0.1)
        done.append("over")

    limited = way == "time limit"
    with (
        pytest.raises(TimeLimitExceeded if limited else KeyboardInterrupt),
        interruptible(),
        time_limit(0.02 if limited else None),
    ):
        if not limited:
            threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGINT]).start()
        with careful():
            busy(5)
    # The generator is resumed by an exception, which its last lines don't get.
    assert done == ["entered", "left"]


def test_a_block_that_hangs_where_nothing_interrupts_is_left_all_the_same() -> None:
    start = time.monotonic()
    with pytest.raises(TimeLimitExceeded), time_limit(0.02), delayed_interrupt():
        busy(20)
    assert 1 <= time.monotonic() - start < 10


def test_a_time_limit_waits_for_the_end_of_a_delayed_block() -> None:
    reached = []
    with pytest.raises(TimeLimitExceeded), time_limit(0.02):
        with delayed_interrupt():
            with delayed_interrupt():
                busy(0.1)
            reached.append(1)
        reached.append(2)
    assert reached == [1]


def test_a_block_that_ends_in_time_is_let_alone() -> None:
    with time_limit(0.05), delayed_interrupt():
        pass
    busy(0.1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_of_somebody_else_goes_off() -> None:
    seen = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with interruptible(), contextlib.suppress(TimeLimitExceeded), time_limit(0.02):
            busy(0.05)
        with interruptible():
            busy(0.02)
        assert not seen and 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.1
        busy(0.15)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with interruptible():
            busy(0.1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen == [signal.SIGALRM] * 2


def test_a_handler_that_does_not_raise_is_called_once_for_each_signal() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with interruptible():
            with delayed_interrupt():
                os.kill(os.getpid(), signal.SIGTERM)
                busy(0.05)
                assert not seen
            assert seen == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGTERM)
            busy(0.05)
        assert seen == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_is_set_to_stay_stays() -> None:
    def handler(number: int, frame: Any) -> None:
        pass

    try:
        with interruptible():
            signal.signal(signal.SIGINT, handler)
        assert signal.getsignal(signal.SIGINT) is handler
        with contextlib.suppress(ValueError), interruptible():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise ValueError
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_delay_nothing() -> None:
    entered, over = threading.Event(), threading.Event()

    def other() -> None:
        with delayed_interrupt(), interruptible(), time_limit(1):
            entered.set()
            over.wait()
            check_pending()

    thread = threading.Thread(target=other)
    with pytest.raises(KeyboardInterrupt), interruptible():
        thread.start()
        entered.wait()
        signal.raise_signal(signal.SIGINT)
        busy(5)
    over.set()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_plain_function_that_swallows_everything_still_times_out() -> None:
    def swallows(model: nn.Module) -> float:
        score = fitness(model)
        try:
            busy(5)
        except BaseException:
            score = 0.0
        return score

    trainer = make(fitness_fn=swallows)
    trainer.engine = LocalEngine(timeout=0.05, retries=0)
    with pytest.raises(TimeoutError):
        trainer.step()
