"""A real Ray cluster of several raylets on this machine, in a process of its own.

    python -m tests.e2e.nodes 3

It prints a line of JSON when all nodes are there: the address, and the process id of each node's
raylet. It ends the nodes when its standard input ends, whatever became of who started it.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_S = 600
"""A machine that is busy needs minutes to start a few raylets."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def serve(nodes: int, cpus: int, jobs_port: int = 0) -> None:
    """The head is one of the nodes; with a port it takes jobs there, in Ray's dashboard."""
    from tune_study.machine import environment

    environment.prepare()
    from ray.cluster_utils import Cluster

    sizes = {"num_cpus": cpus, "object_store_memory": 150 * 2**20}
    head = {**sizes, "include_dashboard": False}
    if jobs_port:
        head |= {"include_dashboard": True, "dashboard_port": jobs_port}
        head["dashboard_agent_listen_port"] = free_port()
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(wait=False, **sizes)
        cluster.wait_for_nodes(timeout=PATIENCE_S)
        all_nodes = [cluster.head_node, *cluster.worker_nodes]
        raylets = [node.all_processes["raylet"][0].process.pid for node in all_nodes]
        print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
        sys.stdin.read()
    finally:
        for node in [*cluster.worker_nodes, cluster.head_node]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)


@contextmanager
def cluster(nodes: int, cpus: int = 1, jobs_port: int = 0) -> Iterator[dict[str, Any]]:
    """``address`` and ``raylets``, the head's first. All its processes end with the context."""
    command = [sys.executable, "-m", "tests.e2e.nodes", *map(str, (nodes, cpus, jobs_port))]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the cluster did not start")
        yield json.loads(line)
    finally:
        process.stdin.close()
        process.wait(timeout=PATIENCE_S)


if __name__ == "__main__":
    serve(*(int(argument) for argument in sys.argv[1:]))
