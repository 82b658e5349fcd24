import os
import signal
import threading

import pytest

from deformable_detr.training.signals import GracefulShutdown, NonFiniteLoss, TrainingInterrupted
from deformable_detr.utils.errors import UserError


@pytest.fixture(autouse=True)
def interruptible():
    """Install Python's default Ctrl-C handler, which background processes do not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_first_signal_is_deferred(number, code):
    before = signal.getsignal(number)
    with GracefulShutdown() as stop:
        stop.raise_if_received()
        os.kill(os.getpid(), number)
        assert stop.received == number
        assert signal.getsignal(number) == before  # the second signal acts immediately
        with pytest.raises(TrainingInterrupted) as caught:
            stop.raise_if_received()
    assert caught.value.code == code
    assert signal.getsignal(number) == before


def test_ignored_hangup_stays_ignored(monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulShutdown() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_ctrl_c_raises_keyboard_interrupt():
    def interrupt_twice():
        with GracefulShutdown():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()


def test_immediate_mode_raises_in_the_handler():
    with GracefulShutdown() as stop:
        stop.immediate = True
        with pytest.raises(TrainingInterrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_signals_are_not_handled_outside_the_main_thread():
    before, handlers = signal.getsignal(signal.SIGTERM), []

    def work():
        with GracefulShutdown():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_non_finite_loss_names_step_losses_and_images():
    error = NonFiniteLoss(7, {"loss": float("nan"), "loss_class_0": 1.0, "loss_giou_1": float("inf")}, [12, 55])
    assert isinstance(error, UserError)
    assert "step 7: loss nan, loss_giou_1 inf; images 12, 55" in str(error)
    assert "loss_class_0" not in str(error)
    assert "\n" not in str(error)
