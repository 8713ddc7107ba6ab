"""Signals at a bad moment: Ctrl-C, a scheduler's SIGTERM, and an alarm of our own.

An exception that a signal raises may come between any two operations of Python: after a mode was set and before the
``try`` that takes it back, in a ``__del__`` where it is lost, in the middle of our own work. So while members are
evaluated, in :class:`interruptible`, a signal is noted, and takes effect as soon as the user's code is running, or
where our own can stop.
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
# Seconds after which is looked again whether a signal may take effect, and whether a block has ended that has had its
# exception.
_TICK, _AGAIN = 0.01, 0.1
# Seconds after which a signal waits for no more than that the user's code is running.
_PATIENCE = 1.0

_PACKAGE = __name__.partition(".")[0]
# Parts of this package that are written like a user's code, or wait for others.
_LIKE_USERS = tuple(f"{_PACKAGE}.{name}" for name in ("distributed", "llm", "rl"))
# Modules that run on somebody's behalf.
_NEUTRAL = (sys.stdlib_module_names | {"greenlet", "numpy", "torch"}) - {"__main__"}
# An exception in the first two would leave behind what is being set up or taken down, in the last it would be lost.
_DELICATE = frozenset({"__enter__", "__exit__", "__del__"})


class TimeLimitExceeded(BaseException):
    """A block took longer than its limit. No ``Exception``, so that a fitness function's own ``except`` misses it."""


class _Guard:
    """Handlers of signals that wait for a good moment.

    Attributes:
        thread: The main thread.
        delays: How many blocks are open in which no signal takes effect.
        waiting: Whether a signal waits.
        limit: The time limit that is in force.
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
        # What handlers have raised, by identity: the exceptions themselves would keep alive what is on their way.
        self._raised: dict[tuple[type[BaseException], int], int] = {}
        self._armed = self._closing = False
        # An exception that the caller is handling is none of ours.
        self._handled = sys.exc_info()[1]
        self._handler: Handler = self._handle
        self._hook = sys.unraisablehook
        self._own_hook = self._unraisable
        # Somebody else's timer: seconds until it goes off, its interval, and when that was.
        self._timer = (*(signal.getitimer(signal.ITIMER_REAL) if _ALARM else (0.0, 0.0)), time.monotonic())

    def open(self) -> None:
        """Install the handlers."""
        for number in (signal.SIGINT, signal.SIGTERM, _ALARM):
            before = None if number is None else signal.getsignal(number)
            # One that C code handles, that is ignored or that ends the process stays as it is.
            if number is not None and (callable(before) or (number == _ALARM and before is not None)):
                self._previous[number] = before
                signal.signal(number, self._handler)
        sys.unraisablehook = self._own_hook

    def close(self, failed: bool) -> None:
        """Put back the handlers, and let what still waits take effect.

        Args:
            failed: Whether an exception is on its way. Otherwise a handler that was set meanwhile was set to stay.
        """
        global _active
        error: BaseException | None = None
        remaining = list(self._previous.items())
        while remaining or _active is self:
            # The handlers that are back may raise.
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
        """Put a time limit in force."""
        self.limit = limit
        self._arm()

    def stop(self, outer: time_limit | None) -> None:
        """Put an outer limit in force again."""
        self.limit = outer
        self.waiting = bool(self._arrived)
        self._arm()

    def check(self) -> None:
        """Let what waits take effect now, unless nothing may, or an exception is cleared up after."""
        if self.waiting and not self.delays and not self._clearing_up():
            self._take_effect(sys._getframe(1))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if _active is not self:
            # It was put back by someone who had found it here.
            _pass_on(number, self._previous[number], frame)
        elif number == _ALARM:
            if self._armed:
                self._settle(frame)
            elif callable(self._previous[number]) or self._timer[0]:
                _pass_on(number, self._previous[number], frame)
        elif number in self._arrived:
            self._arrived.remove(number)
            for _ in range(2):
                self._call(number, frame)
        else:
            self._note(number)
            self._settle(frame)

    def _note(self, number: int) -> None:
        if not self._arrived:
            self._since = time.monotonic()
        self._arrived.append(number)

    def _settle(self, frame: FrameType | None) -> None:
        """Let what has arrived take effect if this is a good moment, else see to it that it will."""
        now = time.monotonic()
        overdue = -1.0 if self.limit is None else now - self.limit.deadline
        self.waiting = bool(self._arrived) or overdue >= 0
        if not self.waiting:
            return
        waited = max(now - self._since if self._arrived else 0.0, overdue)
        patient = waited < _PATIENCE
        if not self.delays:
            if not (patient and self._clearing_up()) and self._users(frame, patient):
                self._take_effect(frame)
        elif self.limit is not None and overdue > self.limit.patience and self._users(frame, False):
            # What the block calls hangs.
            self._exceed()
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
            self._exceed()
        self._arm()

    def _call(self, number: int, frame: FrameType | None) -> None:
        """Do what would have been done without this guard."""
        try:
            _pass_on(number, self._previous[number], frame)
        except BaseException as error:
            self._raised[type(error), id(error)] = number
            raise

    def _exceed(self) -> None:
        assert self.limit is not None and _ALARM is not None
        self.waiting = bool(self._arrived)
        self.limit.raised = True
        self._armed = True
        # It comes again where it is swallowed.
        signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
        raise TimeLimitExceeded

    def _users(self, frame: FrameType | None, patient: bool) -> bool:
        """Return whether the user's code is running, and, to the patient, nowhere that it would rather not end."""
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

    def _clearing_up(self) -> bool:
        """Return whether code is running because of an exception that ends everything, such as ours."""
        error = sys.exc_info()[1]
        return error is not None and error is not self._handled and not isinstance(error, Exception)

    def _unraisable(self, args: Any) -> None:
        """See that an exception which was lost, as in a ``__del__``, comes again."""
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
        """Set the timer for what comes next."""
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
            # Not before: an alarm that came just now is handled at the end of the call.
            self._armed = False


# The guard in force; there is none but in the main thread, which alone receives signals.
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
    """Let signals that wait take effect here: where the caller can stop. Without any, it does nothing."""
    guard = _active
    if guard is not None and guard.waiting and guard.thread == threading.get_ident():
        guard.check()


class interruptible:
    """Let Ctrl-C, SIGTERM where somebody handles it, and our own alarm end the block without harm.

    In the user's code they take effect at once, if possible, or after a moment; in our own at the end of the next
    :class:`delayed_interrupt`, in :func:`check_pending`, or after the block. A second one takes effect at once. An
    exception that is lost, as in a ``__del__``, comes again. Blocks can be nested, and do nothing in other threads.
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
    """Let a Ctrl-C, a SIGTERM that somebody handles, or our own alarm during the block take effect after it.

    They do so also if the block raises. A second one takes effect at once.
    """

    __slots__ = ("_guard", "_own")

    def __enter__(self) -> None:
        guard = _active
        self._own = guard is None
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
            if self._own:
                guard.close(kind is not None)
            elif guard.waiting:
                guard.check()


_get_ident = threading.get_ident


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let a SIGTERM, as schedulers send it, raise ``SystemExit(143)`` in the block, so that what must be done is done.

    Where somebody handles the signal already, or in a thread other than the main one, nothing changes.
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
    """Raise :class:`TimeLimitExceeded` in the block when it has taken ``seconds``.

    It is raised in the user's code, as :class:`interruptible` says, and again where it is swallowed; a block that takes
    long inside a :class:`delayed_interrupt` is left all the same after half as long again. Native code that does not
    return to Python cannot be interrupted. It takes the main thread, and a system with alarms; elsewhere there is no
    limit.

    Args:
        seconds: The limit, or None.
        exit_when_stuck: Whether to end the process, with a traceback, where the block goes on for as long again, and
            for some seconds at least.

    Attributes:
        deadline: When it is over, on the monotonic clock.
        patience: Seconds after which it waits for no block's end.
        raised: Whether the exception has been raised.
    """

    def __init__(self, seconds: float | None, *, exit_when_stuck: bool = False) -> None:
        self._seconds, self._exit_when_stuck = seconds, exit_when_stuck
        self.deadline = self.patience = 0.0
        self.raised = False
        self._guard: _Guard | None = None
        self._own: _Guard | None = None
        self._outer: time_limit | None = None

    def __enter__(self) -> None:
        if self._seconds is None or _ALARM is None:
            return
        guard = _active
        if guard is None:
            guard = self._own = _open(sys._getframe(1))
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
        guard, own = self._guard, self._own
        self._guard = self._own = None
        if guard is None:
            return
        guard.stop(self._outer)
        if self._exit_when_stuck:
            faulthandler.cancel_dump_traceback_later()
        try:
            if own is not None:
                own.close(kind is not None)
            elif guard.waiting:
                guard.check()
        finally:
            # One that was swallowed, or made into another exception, was raised all the same.
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
