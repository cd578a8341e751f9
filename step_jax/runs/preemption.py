"""Leaving a run in good order: agreed stop on SIGTERM or Ctrl-C, and errors that threads find."""

from __future__ import annotations

import itertools
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import jax

from step_jax.core.distributed import TIMEOUT_S, Processes
from step_jax.core.errors import ExitCode, RestartRequested, StepError, from_kind
from step_jax.runs import exit_timer

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_POLL_S = 0.5  # how late a process may learn that another one got a signal
_AGREE_S = 0.02  # the same while the processes agree on a step
#: how long a process whose main thread is in a compiler or waits for others may stay after all
#: have agreed to leave
_LEAVE_S = 10.0
#: seconds without an answer of process 0 after which it is said: JAX's heartbeat goes the same way,
#: and ends the process two to eight seconds later (`distributed.HEARTBEAT_SECONDS`)
_SILENT_S = 3.0
_TELL_S = 0.5  # the coordinator stays that long, for the others to read what was agreed
_NOT_STARTED = -1
_PREPARING, _LEAVE, _FINISHED = "preparing", "leave", "finished"
_instances = itertools.count()


def is_interactive() -> bool:
    """Whether somebody types into this process (IPython, Jupyter, a Python prompt)."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


class StopSignal:
    """Turns SIGTERM and SIGINT into a stop at one step that all processes agree on.

    Use it in a ``with`` statement around the training loop in every process, after
    ``jax.distributed.initialize``, or before it (``joined=False``) and then call `join`::

        with StopSignal() as stop, Checkpointer(...) as saver:
            for step in range(start, total):
                if stop.requested(step):
                    saver.save(step, state, meta)
                    saver.wait()
                    return stop.exit_code
                ...

    The first signal asks for a stop, a second one to the same process ends it at once (128 + signal
    number) without saving, also while the main thread is blocked in a device call. In an
    interactive process (a notebook, a prompt), which holds more than the run, a second SIGINT
    raises KeyboardInterrupt instead. Before the first call of `requested` there is nothing to save:
    then a signal raises `RestartRequested` (or KeyboardInterrupt) in the main thread of all
    processes, and those that do not get to it, in a compiler, end within 10 s with the same code.
    Signals are only caught if the block is entered in the main
    thread, as Python demands.

    With several processes the one that got the signal publishes it; a thread in everyone reports
    the step under way, and all stop after the highest of these. (Waiting for the training loops
    to report instead would deadlock: one may sit in a collective that another has not reached.)
    Until a signal arrives a call of `requested` only sets a number: no collective, no message.

    Attributes:
      failure: the error that all processes end of, see `fail`.
      raised: what was raised in the main thread. What comes out of the block may be another error,
        which an import or a library made of it.
    """

    def __init__(self, on_event: Callable[[str], None] | None = None, *, joined: bool = True):
        self.tell(on_event)
        self.failure: StepError | None = None
        self.raised: BaseException | None = None
        self._processes: Processes | None = None
        self._silence: exit_timer.CTimer | None = None
        if joined:
            self.join()
        self._signal = 0
        self._heard = False  # whether one reached this process, not only another
        self._asked = threading.Event()
        self._decided = threading.Event()
        self._closing = False
        self._lock = threading.Lock()
        self._current = _NOT_STARTED  # the step under way
        self._reported = False
        self._stop_at: int | None = None
        self._handlers: dict[int, Any] = {}
        self._interactive = is_interactive()
        self._leaving: Literal["", "asked", "now", "raised"] = ""  # by an exception, once
        self._forced: exit_timer.CTimer | None = None
        self._poked = False  # a signal that this process sent to its main thread is on its way
        self._reader, self._writer = -1, -1
        self._old_wakeup = -1

    def join(self) -> None:
        """The processes are known now, and stop together."""
        self._processes = everyone = Processes(f"stop/{next(_instances)}")
        if everyone.index > 0:
            self._silence = exit_timer.complaint(
                f"{exit_timer.rank_name(everyone.index, everyone.count)}: process 0 has not "
                f"answered for {_SILENT_S:g} s: it, its machine or the network is gone. JAX ends "
                f"this process if that lasts ({ExitCode.ABORTED})"
            )

    def tell(self, on_event: Callable[[str], None] | None) -> None:
        """What happens is told there from now on (None: to the log)."""
        self._event = on_event or logging.getLogger("step_jax.preemption").warning

    @property
    def _alone(self) -> bool:
        return self._processes is None or self._processes.count == 1

    @property
    def exit_code(self) -> int:
        """What the process should exit with after saving: 42 (restart me), or 130 after Ctrl-C."""
        return ExitCode.INTERRUPTED if self._signal == signal.SIGINT else ExitCode.RESTART

    def requested(self, step: int) -> bool:
        """Whether to save and stop instead of taking step ``step``; the same in all processes.

        Must be called with rising steps at the same places of the loop in every process.

        Raises:
          StepError: a thread has found that the run must end.
        """
        if self.failure is not None:
            raise self.failure
        with self._lock:
            if not self._reported:
                self._current = step
                if not self._alone:
                    return False
        if self._alone:
            return self._asked.is_set()
        if not self._decided.wait(TIMEOUT_S):
            raise TimeoutError(
                f"a stop was requested but a process did not answer within {TIMEOUT_S} s"
            )
        return self._stop_at is not None and step >= self._stop_at

    def fail(self, error: StepError) -> None:
        """Ends the run in all processes, without saving, with an error that a thread found.

        Here it is raised in the main thread, and if that is not done with all within 5 s the
        process ends with the error's code; the others end at once.
        """
        self.failure = error
        self._event(str(error))
        if self._processes is not None and not self._alone:
            self._processes.publish("failure", json.dumps([type(error).__name__, str(error)]))
            time.sleep(_TELL_S + _POLL_S)
        self._leave()

    def __enter__(self) -> StopSignal:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        if threading.current_thread() is threading.main_thread():
            # The C part of the handler writes the signal number to the pipe, so the thread sees
            # it even while the main thread runs no Python code.
            self._old_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            for number in _SIGNALS:
                self._handlers[number] = signal.signal(number, self._in_main_thread)
        self._thread = threading.Thread(target=self._watch, name="stop-signal", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            # None: the handler before ours was not installed from Python, so it is unknown here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._handlers:
            signal.set_wakeup_fd(self._old_wakeup)
        self._closing = True
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)
        if self._silence is not None:
            self._silence.delete()
        # with others it may wait for them yet: JAX does so at its end, for minutes
        if self._forced is not None and self._alone and not jax.distributed.is_initialized():
            self._forced.delete()
        if self._processes is not None and not self._alone:
            # The others must not wait for a process that has left its loop.
            self._report(_FINISHED)
            if self._processes.index == 0 and not self._decided.is_set():
                self._processes.publish("decision", _FINISHED)

    def _in_main_thread(self, number: int, _: Any) -> None:
        leaving, self._leaving = self._leaving, "raised" if self._leaving else ""
        if leaving in ("", "raised"):
            return
        if leaving == "now" and self.failure is not None:
            self.raised = self.failure
        elif leaving == "asked" or self._signal == signal.SIGINT:
            self.raised = KeyboardInterrupt()
        else:
            self.raised = RestartRequested(
                "stopped before its first step: start the same command to go on"
            )
        raise self.raised

    @property
    def _prepares(self) -> bool:
        """Whether leaving at once loses nothing, in a process that holds nothing else."""
        return self._current == _NOT_STARTED and not self._interactive

    def _report(self, state: str) -> None:
        assert self._processes is not None
        with self._lock:
            if not self._reported:
                self._reported = True
                state = state or (_PREPARING if self._prepares else str(self._current))
                self._processes.publish(f"at/{self._processes.index}", state)

    def _leave(self) -> None:
        """Ends the process without saving: by an exception, or soon by force."""
        self._leaving, self._poked = "now", True
        if exit_timer.available() and not self._interactive:
            # After a failure sooner: the others are gone, of which JAX would abort this one.
            code, seconds = self.exit_code, _LEAVE_S
            if self.failure is not None:
                code, seconds = self.failure.exit_code, _LEAVE_S / 2
            self._forced = exit_timer.CTimer("_exit", code)
            self._forced.set(seconds)
        if self._handlers:  # it also wakes the main thread if it sleeps or reads
            number = self._signal or signal.SIGTERM
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _watch(self) -> None:
        while not self._closing:
            # Until the processes are known this looks for them, too.
            quiet = self._processes is not None and self._alone
            pause = None if quiet else _AGREE_S if self._asked.is_set() else _POLL_S
            ready, _, _ = select.select([self._reader], [], [], pause)
            for number in os.read(self._reader, 64) if ready else b"":
                if number in _SIGNALS:
                    self._received(number)
            if not self._alone and not self._decided.is_set() and not self._closing:
                try:
                    self._exchange()
                except jax.errors.JaxRuntimeError as e:
                    self._event(f"stop signals can no longer be agreed: {e}")
                    return

    def _received(self, number: int) -> None:
        if self._poked:
            self._poked = False
            return
        name = signal.Signals(number).name
        stays = self._interactive and number == signal.SIGINT  # see _in_main_thread
        if self._heard:
            if stays:
                # Only this thread can count signals: the main thread is told of two as of one if it
                # was not scheduled in between.
                if not self._leaving:
                    self._leaving = "asked"
                    signal.pthread_kill(threading.main_thread().ident or 0, number)
                return
            sys.stderr.write(f"second signal ({name}): exiting without saving\n")
            sys.stderr.flush()
            os._exit(128 + number)
        self._heard = True
        if self._asked.is_set():  # a cluster signals all processes, and another was quicker to tell
            return
        self._signal = number
        code, second = self.exit_code, "a second one stops at once without saving"
        if not stays:
            second = f"then exit code {code}; a second signal exits at once without saving"
        saving = "leaving before the first step" if self._prepares else "saving at the next step"
        self._event(f"{name} received: {saving}, {second}")
        self._asked.set()
        if self._alone:
            if self._prepares:
                self._leave()
        elif self._processes is not None:
            self._processes.publish("request", str(number))

    def _published(self, processes: Processes) -> dict[str, str]:
        if self._silence is None:
            return processes.published()
        self._silence.set(_SILENT_S)
        try:
            return processes.published()
        finally:
            self._silence.set(0)

    def _exchange(self) -> None:
        """One look at the messages of the other processes."""
        assert self._processes is not None
        messages = self._published(self._processes)
        if "failure" in messages and self.failure is None:
            # Nothing here is worth a good end: what is written is written by the one that failed.
            error = from_kind(*json.loads(messages["failure"]))
            sys.stderr.write(f"step-jax: {error}\n")
            sys.stderr.flush()
            os._exit(error.exit_code)
        if "request" in messages and not self._asked.is_set():
            self._signal = int(messages["request"])
            self._asked.set()
        if self._asked.is_set():
            self._report("")
        at = [v for k, v in messages.items() if k.startswith("at/")]
        if self._processes.index == 0 and len(at) == self._processes.count:
            # A process that has finished its loop will not save: then all finish theirs. One that
            # has not begun has nothing to save, and the others cannot step without it.
            ways = (_FINISHED in at and _FINISHED) or (_PREPARING in at and _LEAVE)
            decision = ways or str(max(map(int, at)) + 1)
            self._processes.publish("decision", decision)
            messages = {"decision": decision, **messages}
        if "decision" in messages:
            decision = messages["decision"]
            if decision not in (_FINISHED, _LEAVE):
                self._stop_at = int(decision)
            self._decided.set()
            if decision == _LEAVE:
                if self._processes.index == 0:
                    time.sleep(_TELL_S)
                self._leave()
