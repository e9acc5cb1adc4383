"""The command line: ``python -m tune_study.run --grid full``."""

# ruff: noqa: E402  (Ray and torch read the environment while they are imported)
from __future__ import annotations

from tune_study.machine import environment

environment.prepare()

import inspect
import sys
from typing import Any

import ray
import typer

from tune_study.cluster import local
from tune_study.errors import UserError, printed
from tune_study.study.options import EXIT_STOPPED, EXIT_USER, Options, checked, refuse_client

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def study(**given: Any) -> None:
    """Run a study of quantized LoRA fine-tuning; the same command continues an interrupted one."""
    options = Options(**given)
    refuse_client(options.address, sys.argv[1:])
    options = checked(options)
    counted = "auto" not in (options.gpus_per_trial, options.max_concurrent)
    if options.address == "local" and options.works and counted:
        slots = options.max_concurrent or 1
        local.start_during_imports(slots, dashboard=options.dashboard, simulated=options.simulate)
    from tune_study.study import session

    raise typer.Exit(session.execute(options))


study.__signature__ = inspect.signature(Options, eval_str=True)  # type: ignore[attr-defined]
app.command()(study)


def main() -> None:
    """Entry point: the user's mistakes are one sentence on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(printed(error), file=sys.stderr)
        sys.exit(getattr(error, "exit_code", EXIT_USER))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_STOPPED["interrupt"])
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
