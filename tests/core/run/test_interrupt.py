from __future__ import annotations

import os
import signal
import threading

import pytest

from dovetail.run.interrupt import Interrupt

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_sets_a_flag_and_stops_nothing(number: signal.Signals) -> None:
    with Interrupt() as interrupt:
        assert not interrupt.is_set
        os.kill(os.getpid(), number)
        assert interrupt.is_set


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_the_second_signal_stops_at_once(first: signal.Signals, second: signal.Signals) -> None:
    def interrupted_twice() -> None:
        with Interrupt():
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), second)

    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_earlier_handlers_are_put_back() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with Interrupt():
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_python_does_not_know_is_no_trouble() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    interrupt = Interrupt()
    with interrupt:
        # What `signal.signal` returns for a handler that a library in C has set.
        interrupt._previous = dict.fromkeys(interrupt._previous)
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_outside_the_main_thread_nothing_is_caught_and_nothing_fails() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen: list[object] = []

    def run() -> None:
        with Interrupt() as interrupt:
            seen.append(interrupt.is_set)
            seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert seen == [False, before]
