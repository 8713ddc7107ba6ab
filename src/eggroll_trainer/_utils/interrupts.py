"""Delays signals to a safe moment: Ctrl-C, a scheduler's SIGTERM, and the alarm of our time limits.

A signal handler may raise an exception between any two operations of Python: between the setting of a mode and the
``try`` that resets it, in a ``__del__``, where exceptions are ignored, or in the middle of our own work. So while
members are evaluated, in :class:`interruptible`, a signal is recorded. It takes effect when the user's code is running,
or where our code can stop.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

Handler = Callable[[int, "FrameType | None"], Any]

_ALARM = getattr(signal, "SIGALRM", None) if hasattr(signal, "setitimer") else None
# Seconds between checks whether a waiting signal may take effect, and between repeated exceptions of a time limit.
_TICK, _AGAIN = 0.01, 0.1
# After this many seconds, a signal takes effect anywhere in the user's code.
_PATIENCE = 1.0

_PACKAGE = __name__.partition(".")[0]
# Parts of this package that may be interrupted like a user's code.
_LIKE_USERS = tuple(f"{_PACKAGE}.{name}" for name in ("distributed", "llm", "rl"))
# Modules whose frames belong to their caller: the user's code or ours.
_NEUTRAL = (sys.stdlib_module_names | {"greenlet", "numpy", "torch"}) - {"__main__"}
# Methods that should not be interrupted: an exception would leave a context half set up, or be ignored in __del__.
_DELICATE = frozenset({"__enter__", "__exit__", "__del__"})


class TimeLimitExceeded(BaseException):
    """A block took longer than its limit. It is no ``Exception``, so ``except Exception`` does not catch it."""


class _Guard:
    """Signal handlers that delay signals to a safe moment.

    Attributes:
        thread: The main thread.
        delays: Number of open blocks in which no signal takes effect.
        waiting: Whether a signal is waiting.
        limit: The active time limit, or None.
    """

    def __init__(self, home: FrameType) -> None:
        self.thread = threading.get_ident()
        self.delays = 0
        self.waiting = False
        self.limit: time_limit | None = None
        self._home: FrameType | None = home
        self._previous: dict[int, Any] = {}
        self._arrived: list[int] = []
        self._since = 0.0
        # Exceptions of handlers, by identity: references would keep the frames of their tracebacks alive.
        self._raised: dict[tuple[type[BaseException], int], int] = {}
        self._armed = self._closing = False
        # An exception that the caller is already handling.
        self._handled = sys.exc_info()[1]
        self._handler: Handler = self._handle
        self._hook = sys.unraisablehook
        self._own_hook = self._unraisable
        # The user's timer: seconds until it expires, its interval, and the time of this reading.
        self._timer = (*(signal.getitimer(signal.ITIMER_REAL) if _ALARM else (0.0, 0.0)), time.monotonic())

    def open(self) -> None:
        """Install the handlers."""
        for number in (signal.SIGINT, signal.SIGTERM, _ALARM):
            before = None if number is None else signal.getsignal(number)
            # Leave signals alone that C code handles, that are ignored or that end the process.
            if number is not None and (callable(before) or (number == _ALARM and before is not None)):
                self._previous[number] = before
                signal.signal(number, self._handler)
        sys.unraisablehook = self._own_hook

    def close(self, failed: bool) -> None:
        """Restore the handlers, and let waiting signals take effect.

        Args:
            failed: Whether the block has raised. If not, handlers that the block has set stay.
        """
        global _active
        error: BaseException | None = None
        remaining = list(self._previous.items())
        while remaining or _active is self:
            # A handler that is restored already may raise.
            try:
                self._closing, self.limit = True, None
                self._disarm()
                if sys.unraisablehook is self._own_hook:
                    sys.unraisablehook = self._hook
                while remaining:
                    number, handler = remaining[-1]
                    if failed or signal.getsignal(number) is self._handler:
                        signal.signal(number, handler)
                    remaining.pop()
                _active = None
            except BaseException as raised:
                error = raised
        self._home = self._handled = None
        self._raised.clear()
        arrived, self._arrived = self._arrived, []
        try:
            if error is not None:
                raise error
        finally:
            _raise_all(arrived)

    def start(self, limit: time_limit) -> None:
        """Activate a time limit."""
        self.limit = limit
        self._arm()

    def stop(self, outer: time_limit | None) -> None:
        """Deactivate the time limit, and activate the outer one again."""
        self.limit = outer
        self.waiting = bool(self._arrived)
        self._arm()

    def check(self) -> None:
        """Let waiting signals take effect now, unless they are delayed or code is cleaning up after an exception."""
        if self.waiting and not self.delays and not self._cleaning_up():
            self._take_effect(sys._getframe(1))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if _active is not self:
            # The block has ended, but someone has restored this handler.
            _pass_on(number, self._previous[number], frame)
        elif number == _ALARM:
            if self._armed:
                self._take_effect_if_safe(frame)
            elif callable(self._previous[number]) or self._timer[0]:
                _pass_on(number, self._previous[number], frame)
        elif number in self._arrived:
            self._arrived.remove(number)
            for _ in range(2):
                self._call(number, frame)
        else:
            self._note(number)
            self._take_effect_if_safe(frame)

    def _note(self, number: int) -> None:
        if not self._arrived:
            self._since = time.monotonic()
        self._arrived.append(number)

    def _take_effect_if_safe(self, frame: FrameType | None) -> None:
        """Let signals that have arrived take effect if this is a safe moment; else set a timer to try again."""
        now = time.monotonic()
        overdue = -1.0 if self.limit is None else now - self.limit.deadline
        self.waiting = bool(self._arrived) or overdue >= 0
        if not self.waiting:
            return
        waited = max(now - self._since if self._arrived else 0.0, overdue)
        patient = waited < _PATIENCE
        if not self.delays:
            if not (patient and self._cleaning_up()) and self._in_users_code(frame, patient):
                self._take_effect(frame)
        elif self.limit is not None and overdue > self.limit.patience and self._in_users_code(frame, False):
            # User code inside the delaying block hangs.
            self._raise_time_limit()
        if self.waiting:
            self._arm()

    def _take_effect(self, frame: FrameType | None) -> None:
        while self._arrived:
            number = self._arrived.pop(0)
            self.waiting = bool(self._arrived)
            self._arm()
            self._call(number, frame)
        self.waiting = False
        if self.limit is not None and time.monotonic() >= self.limit.deadline:
            self._raise_time_limit()
        self._arm()

    def _call(self, number: int, frame: FrameType | None) -> None:
        """Call the handler that was installed before this guard."""
        try:
            _pass_on(number, self._previous[number], frame)
        except BaseException as error:
            self._raised[type(error), id(error)] = number
            raise

    def _raise_time_limit(self) -> None:
        assert self.limit is not None and _ALARM is not None
        self.waiting = bool(self._arrived)
        self.limit.raised = True
        self._armed = True
        # Raise it again if it is swallowed.
        signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
        raise TimeLimitExceeded

    def _in_users_code(self, frame: FrameType | None, patient: bool) -> bool:
        """Return whether the user's code is running; if ``patient``, not where it should not be interrupted."""
        whose: bool | None = None
        while frame is not None:
            if patient and frame.f_code.co_name in _DELICATE:
                return False
            if whose is None:
                name = str(frame.f_globals.get("__name__", ""))
                root = name.partition(".")[0]
                if root == _PACKAGE:
                    whose = name.startswith(_LIKE_USERS)
                elif root not in _NEUTRAL:
                    whose = True
                elif patient and root in ("weakref", "_weakrefset"):
                    return False
                if whose is False:
                    return False
            if frame is self._home:
                break
            frame = frame.f_back
        return True

    def _cleaning_up(self) -> bool:
        """Return whether code is running that cleans up after an exception such as ``KeyboardInterrupt`` or ours."""
        error = sys.exc_info()[1]
        return error is not None and error is not self._handled and not isinstance(error, Exception)

    def _unraisable(self, args: Any) -> None:
        """Raise an exception of ours again that Python has ignored, as in a ``__del__``."""
        error = args.exc_value
        number = self._raised.get((type(error), id(error)))
        if number is not None:
            if number not in self._arrived:
                self._note(number)
            self.waiting = True
            self._arm()
        elif self.limit is None or not isinstance(error, TimeLimitExceeded):
            self._hook(args)

    def _arm(self) -> None:
        """Set the timer for the next check or deadline."""
        if _ALARM is None or self._closing:
            return
        if self.limit is None and (self._timer[0] or not self.waiting):
            self._disarm()
            return
        self._armed = True
        if self.waiting:
            signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
        elif self.limit is not None:
            signal.setitimer(signal.ITIMER_REAL, max(self.limit.deadline - time.monotonic(), 1e-6), _AGAIN)

    def _disarm(self) -> None:
        if self._armed:
            seconds, interval, since = self._timer
            left = max(seconds - (time.monotonic() - since), 1e-6) if seconds else 0.0
            signal.setitimer(signal.ITIMER_REAL, left, interval)
            # Only now: an alarm that has just arrived is handled when setitimer returns.
            self._armed = False


# The active guard. It exists in the main thread only, which receives all signals.
_active: _Guard | None = None


def _open(home: FrameType) -> _Guard | None:
    global _active
    if threading.current_thread() is not threading.main_thread():
        return None
    guard = _active = _Guard(home)
    try:
        guard.open()
    except BaseException:
        guard.close(True)
        raise
    return guard


def _pass_on(number: int, handler: Any, frame: FrameType | None) -> None:
    if callable(handler):
        handler(number, frame)
    else:
        signal.signal(number, handler)
        signal.raise_signal(number)


def _raise_all(numbers: list[int]) -> None:
    if numbers:
        try:
            signal.raise_signal(numbers[0])
        finally:
            _raise_all(numbers[1:])


def check_pending() -> None:
    """Let waiting signals take effect here, where the caller can stop."""
    guard = _active
    if guard is not None and guard.waiting and guard.thread == threading.get_ident():
        guard.check()


class interruptible:
    """Let Ctrl-C, SIGTERM (if it has a handler) and the alarm of time limits interrupt the block safely.

    In the user's code, signals take effect at once if possible, or after a moment. In our code, they take effect at the
    end of the next :class:`delayed_interrupt`, in :func:`check_pending`, or after the block. A second signal takes
    effect at once. An exception that Python ignores, as in a ``__del__``, is raised again. Blocks can be nested. In
    threads other than the main one, they do nothing.
    """

    __slots__ = ("_guard",)

    def __enter__(self) -> None:
        self._guard = _open(sys._getframe(1)) if _active is None else None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.close(kind is not None)
        else:
            check_pending()


class delayed_interrupt:
    """Delay Ctrl-C, SIGTERM (if it has a handler) and the alarm of time limits until after the block.

    They take effect even if the block raises. A second signal takes effect at once.
    """

    __slots__ = ("_guard", "_opened")

    def __enter__(self) -> None:
        guard = _active
        self._opened = guard is None
        if guard is None:
            guard = _open(sys._getframe(1))
        elif guard.thread != _get_ident():
            guard = None
        self._guard = guard
        if guard is not None:
            guard.delays += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        guard = self._guard
        if guard is not None:
            guard.delays -= 1
            if self._opened:
                guard.close(kind is not None)
            elif guard.waiting:
                guard.check()


_get_ident = threading.get_ident


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Inside the block, a SIGTERM, as job schedulers send it, raises ``SystemExit(143)``, so that clean-up code runs.

    If the signal has a handler already, or in threads other than the main one, this does nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class time_limit:
    """Raise :class:`TimeLimitExceeded` in the block after ``seconds``.

    It is raised in the user's code, as described in :class:`interruptible`, and raised again if it is swallowed. After
    half as long again, it is raised even inside a :class:`delayed_interrupt`. Native code that does not return to
    Python cannot be interrupted. Time limits need the main thread, and a system with alarms; elsewhere there is none.

    Args:
        seconds: The limit, or None for no limit.
        exit_when_stuck: Whether to end the process with a traceback if the block takes twice as long, and at least some
            seconds longer.

    Attributes:
        deadline: The end of the limit, on the monotonic clock.
        patience: Seconds after the deadline from which on delaying blocks are interrupted too.
        raised: Whether the exception has been raised.
    """

    def __init__(self, seconds: float | None, *, exit_when_stuck: bool = False) -> None:
        self._seconds, self._exit_when_stuck = seconds, exit_when_stuck
        self.deadline = self.patience = 0.0
        self.raised = False
        self._guard: _Guard | None = None
        self._opened: _Guard | None = None
        self._outer: time_limit | None = None

    def __enter__(self) -> None:
        if self._seconds is None or _ALARM is None:
            return
        guard = _active
        if guard is None:
            guard = self._opened = _open(sys._getframe(1))
        if guard is None or guard.thread != threading.get_ident():
            return
        self._guard, self._outer, self.raised = guard, guard.limit, False
        self.patience = max(_PATIENCE, self._seconds / 2)
        if self._exit_when_stuck:
            stuck = self._seconds + max(self._seconds, 2 * _PATIENCE)
            faulthandler.dump_traceback_later(stuck, exit=True, file=sys.__stderr__ or sys.stderr)
        self.deadline = time.monotonic() + self._seconds
        guard.start(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        guard, opened = self._guard, self._opened
        self._guard = self._opened = None
        if guard is None:
            return
        guard.stop(self._outer)
        if self._exit_when_stuck:
            faulthandler.cancel_dump_traceback_later()
        try:
            if opened is not None:
                opened.close(kind is not None)
            elif guard.waiting:
                guard.check()
        finally:
            # Raise it again if it was swallowed, or converted to another exception.
            if self.raised and (error is None or (isinstance(error, Exception) and _stems_from(error))):
                raise TimeLimitExceeded from error


def _stems_from(error: BaseException) -> bool:
    """Return whether an exception was raised because a time limit was exceeded, or while that was handled."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if isinstance(one, TimeLimitExceeded):
            return True
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            todo += [one.__cause__, one.__context__]
    return False
