"""A real S3 server on loopback: moto's, in a process of its own."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "studies"
PATIENCE_S = 300


@contextmanager
def server(log) -> Iterator[str]:
    """Its endpoint, with an empty bucket; the process ends with the context."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        _wait(process, endpoint, log)
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        with urllib.request.urlopen(request):
            yield endpoint
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen, endpoint: str, log) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"{endpoint}/moto-api/data.json") as answer:
                json.load(answer)
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"moto's server did not start:\n{log.read_text()}") from None
            time.sleep(0.2)


def environment(endpoint: str) -> dict[str, str]:
    """What the commands of a study need to reach it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
