"""A function in another process: its answer, its death, and Ctrl-C, which is not for it."""

import math
import os
import signal

import pytest

from tune_study.machine.process import Died, in_process


def test_the_answer_comes_from_another_process_that_leaves_ctrl_c_to_this_one():
    before = signal.getsignal(signal.SIGINT)
    assert in_process(math.hypot, 3.0, 4.0) == 5.0
    assert in_process(signal.getsignal, signal.SIGINT) == signal.SIG_IGN
    assert in_process(os.getpid) != os.getpid()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_that_dies_is_told_with_its_exit_code():
    with pytest.raises(Died, match="its process ended with exit code 7"):
        in_process(os._exit, 7)
