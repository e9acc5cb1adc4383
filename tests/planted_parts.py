"""Parts of an accelerator's check that end in every way. Light to import: each is a process."""

import os
import signal
import subprocess
import sys
import time

from benchmarks.processes import Row


def machine(settings):
    hardware = {"cpu": "a planted CPU", "cores": 2, "gpu": None, "memory_bytes": 2**30}
    about = {"at": "now", "commit": None, "versions": {"torch": "0.0.1"}, "hardware": hardware}
    yield Row("machine", None, "planted", {**about, "device": settings["device"], "threads": 1})


def sound(settings):
    yield Row("sum", True, f"{settings['batch']} | images", {"value": 3})


def raises(settings):
    yield Row("before", True, "sound")
    print("some words")
    raise ValueError("planted")


def is_killed(settings):
    yield Row("before", True, "sound")
    print("on the way", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def overruns(settings):
    yield Row("before", True, "sound")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, file=sys.stderr, flush=True)
    time.sleep(600)


def says_nothing(settings):
    yield from ()


def ends_by_itself(config, folder, device):
    """In place of a trial that is to be killed."""
    sys.exit(3)
