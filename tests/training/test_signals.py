import os
import signal
import threading

import pytest

from deformable_detr.training.signals import GracefulShutdown, NonFiniteLoss, TrainingInterrupted
from deformable_detr.utils.errors import UserError


@pytest.fixture(autouse=True)
def interruptible():
    """Python's own answer to Ctrl-C, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_waits_to_be_asked_for(number, code):
    before = signal.getsignal(number)
    with GracefulShutdown() as stop:
        stop.raise_if_received()
        os.kill(os.getpid(), number)
        assert stop.received == number
        assert signal.getsignal(number) == before  # the second one acts at once
        with pytest.raises(TrainingInterrupted) as caught:
            stop.raise_if_received()
    assert caught.value.code == code
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_acts_as_elsewhere():
    def two():
        with GracefulShutdown():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        two()


def test_immediate_raises_where_the_signal_arrives():
    with GracefulShutdown() as stop:
        stop.immediate = True
        with pytest.raises(TrainingInterrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with GracefulShutdown():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_non_finite_loss_is_one_line_with_step_losses_and_images():
    error = NonFiniteLoss(7, {"loss": float("nan"), "loss_class_0": 1.0, "loss_giou_1": float("inf")}, [12, 55])
    assert isinstance(error, UserError)
    assert "step 7: loss nan, loss_giou_1 inf; images 12, 55" in str(error)
    assert "loss_class_0" not in str(error)
    assert "\n" not in str(error)
