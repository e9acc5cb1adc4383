"""The command line: ``python -m tune_study.run --grid full``."""

# ruff: noqa: E402  (Ray and torch read the environment while they are imported)
from __future__ import annotations

from tune_study import environment

environment.prepare()

import sys
from pathlib import Path
from typing import Annotated

import ray
import typer

from tune_study import local_ray
from tune_study.config import UserError
from tune_study.options import EXIT_STOPPED, EXIT_USER, Options, checked

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def study(
    grid: Annotated[
        str | None,
        typer.Option(help="demo (the default), full, smoke, or path/to/my_grid.py:my_function"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="study folder; default: the grid's name")] = None,
    output_dir: Annotated[Path, typer.Option(help="where study folders lie")] = Path("ray_results"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="e.g. training.num_train_epochs=3"),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="CIFAR: torchvision's layout or Hugging Face parquet")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="file, or folder with MODEL.safetensors; default: the hub")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, mps or cuda")] = "auto",
    train_size: Annotated[int | None, typer.Option(help="stratified subset, in images")] = None,
    val_size: Annotated[int | None, typer.Option(help="validation images")] = None,
    test_size: Annotated[int | None, typer.Option(help="stratified subset, in images")] = None,
    max_experiments: Annotated[int | None, typer.Option(min=1, help="only the first N")] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URI", help="where studies are kept, such as s3://bucket/path"),
    ] = None,
    address: Annotated[
        str, typer.Option(help="local, or a Ray cluster: auto, HOST:PORT or ray://HOST:PORT")
    ] = "local",
    batch: Annotated[
        str | None, typer.Option(help="auto: the fastest micro-batch that fits, for all modes")
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="trials at a time; default 1, on a cluster all that fit"
        ),
    ] = None,
    cpus_per_trial: Annotated[
        int | None, typer.Option(min=1, max=1024, help="cores and threads of a trial")
    ] = None,
    gpus_per_trial: Annotated[
        float | None, typer.Option(min=0, help="share of a GPU, such as 0.5")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="show the planned trials and exit")] = False,
    validate_only: Annotated[bool, typer.Option(help="build and check every model")] = False,
    resume: Annotated[bool, typer.Option(help="refuse to begin a new study")] = False,
    retry_failed: Annotated[bool, typer.Option(help="run failed trials again")] = False,
    max_hours: Annotated[
        float | None, typer.Option(min=0, help="stop at an epoch's end after so many hours")
    ] = None,
    keep_checkpoints: Annotated[
        str, typer.Option(help="of finished trials: all, best (the adapter) or none")
    ] = "best",
    simulate: Annotated[
        bool, typer.Option(help="draw the trials from a model instead of training them")
    ] = False,
    effect: Annotated[
        list[str] | None,
        typer.Option(metavar="MODE=DIFFERENCE", help="planted by --simulate, e.g. nf4=-0.01"),
    ] = None,
    seed_sd: Annotated[
        float | None, typer.Option(min=0, max=1, help="of --simulate; default 0.004")
    ] = None,
    epoch_s: Annotated[
        float | None, typer.Option(min=0, help="of --simulate: how long an epoch lasts")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="optuna: search a space instead of running a grid")
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="qlora (the default), demo, or path/to/my_space.py:my_function"),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="trials of a search; default 40")
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="one or two: val_accuracy, weights_bytes, peak_train_bytes, train_time_s"
        ),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="asha prunes a search with one objective; default fifo")
    ] = None,
    search_seed: Annotated[
        int | None, typer.Option(min=0, help="of what a search suggests; default 0")
    ] = None,
    log: Annotated[
        list[str] | None, typer.Option(help="mlflow or wandb: the trials in a tracker as well")
    ] = None,
    dashboard: Annotated[bool, typer.Option(help="start Ray's dashboard")] = False,
) -> None:
    """Run a study of quantized LoRA fine-tuning; the same command continues an interrupted one."""
    given = Options(**locals())
    if address.startswith("ray://"):
        raise typer.Exit(_on_head(given))
    given = checked(given)
    if address == "local" and given.works:
        local_ray.start_during_imports(max_concurrent or 1, dashboard=dashboard)
    from tune_study import command

    raise typer.Exit(command.execute(given))


def _on_head(given: Options) -> int:
    from tune_study.client import run_on_head
    from tune_study.cluster import check_options

    check_options(given.address, given.storage, given.search)
    return run_on_head(given.address, sys.argv[1:])


def main() -> None:
    """Entry point: the user's mistakes are one sentence on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        line = "".join(letter if letter.isprintable() else " " for letter in str(error))
        print(f"error: {line}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", EXIT_USER))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_STOPPED["interrupt"])
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
