"""What a search asks: its settings, its space, and the configuration that an answer means."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from search_spaces import optuna_spaces
from search_spaces.lookup import function_of
from tune_study.config import TrialConfig, assign, parse_trial
from tune_study.data.names import Names
from tune_study.errors import UserError
from tune_study.folder.files import read_json

OBJECTIVES = {
    "val_accuracy": "maximize",
    "weights_bytes": "minimize",
    "peak_train_bytes": "minimize",
    "train_time_s": "minimize",
}
"""Columns of the trials table that can be searched for. The test accuracy is none of them: test
images never influence a choice."""
SIMULATED = ("val_accuracy", "weights_bytes")
"""What a simulated trial has of them."""
DEFAULT_OBJECTIVES = ("val_accuracy", "weights_bytes")
DEFAULT_SAMPLES = 40
SCHEDULERS = ("fifo", "asha")
PROBES = 200
"""Configurations drawn before anything is written, to find combinations that cannot be."""

Space = Callable[[Any], Mapping[str, Any]]


class Settings(NamedTuple):
    """A search as the command describes it."""

    name: str
    """Of the space, for the study folder."""
    space: str
    ask: Space
    objectives: tuple[str, ...]
    num_samples: int
    scheduler: str
    seed: int
    assignments: tuple[tuple[str, Any], ...]
    compute_dtype: str | None = None
    """Of trials that do not name theirs, where the device has no kernel for bf16."""
    names: Names | None = None
    """What the study calls its folders of images."""

    def with_names(self, names: Names) -> Settings:
        fixed = [(k, names.of(v) if k == "dataset" else v) for k, v in self.assignments]
        return self._replace(names=names, assignments=tuple(fixed))

    def record(self) -> dict[str, Any]:
        """What study.json keeps of it."""
        return {
            "algorithm": "optuna",
            "space": self.space,
            "objectives": [{"name": n, "direction": OBJECTIVES[n]} for n in self.objectives],
            "num_samples": self.num_samples,
            "scheduler": self.scheduler,
            "seed": self.seed,
            "set": dict(self.assignments),
            "compute_dtype": self.compute_dtype,
            "params": {},
        }

    def config(self, trial: Any) -> TrialConfig:
        """The configuration for what ``trial`` (Optuna's) answers. Raises ``UserError``."""
        fixed = [pair for name, value in self.assignments for pair in _leaves(name, value)]
        try:
            values = self.ask(_Fixed(trial, dict(fixed)))
        except Exception as error:  # the user's own code may raise anything
            raise UserError(f"--space {self.space}: {type(error).__name__}: {error}") from error
        if not isinstance(values, Mapping):
            raise UserError(
                f"--space {self.space}: it returned {type(values).__name__}, not a configuration"
            )
        for name, value in fixed:
            values = assign(values, name, value)
        training = values.get("training", {})
        if self.compute_dtype and "compute_dtype" not in training:
            values = assign(values, "training.compute_dtype", self.compute_dtype)
        try:
            drawn = parse_trial(values)
            return drawn.on(self.names.of(drawn.dataset)) if self.names else drawn
        except UserError as error:
            answers = ", ".join(f"{name} = {value}" for name, value in trial.params.items())
            raise UserError(
                f"--space {self.space}: {error} (with {answers or 'nothing asked'}); leave that "
                "combination out of the space"
            ) from None


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """``quantization=nf4`` fixes the mode alone, and a mapping each field that it names."""
    if name == "quantization" and isinstance(value, str):
        return [("quantization.mode", value)]
    if name in ("lora", "quantization", "data", "training") and isinstance(value, Mapping):
        return [(f"{name}.{key}", inner) for key, inner in value.items()]
    return [(name, value)]


_SCALARS = (bool, int, float, str)


def _label(name: str, choice: Any) -> str:
    """For Optuna, whose file gives back a tuple as a list, and then knows no such choice."""
    try:
        return json.dumps(choice, sort_keys=True)
    except (TypeError, ValueError):
        raise ValueError(
            f"choice {choice!r:.100} of {name} can't be kept; choose among numbers, words, lists "
            "and mappings"
        ) from None


class _Fixed:
    """An Optuna trial in front of which ``--set`` stands: what it fixes is not asked."""

    def __init__(self, trial: Any, fixed: Mapping[str, Any]) -> None:
        self._trial, self._fixed = trial, fixed

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        field = name.partition("/")[0]
        if field not in self._fixed:
            if all(choice is None or isinstance(choice, _SCALARS) for choice in choices):
                return self._trial.suggest_categorical(name, choices)
            labels = [_label(name, choice) for choice in choices]
            return choices[labels.index(self._trial.suggest_categorical(name, labels))]
        value = self._fixed[field]
        return value if value in choices else choices[0]  # the field itself is replaced later

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        field = name.partition("/")[0]
        if field not in self._fixed:
            return self._trial.suggest_float(name, low, high, **options)
        return self._fixed[field] if field == name else low

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        field = name.partition("/")[0]
        if field not in self._fixed:
            return self._trial.suggest_int(name, low, high, **options)
        return self._fixed[field] if field == name else low


def settings(
    *,
    search: str | None,
    space: str | None,
    num_samples: int | None,
    objectives: Sequence[str] | None,
    scheduler: str | None,
    seed: int | None,
    assignments: Sequence[tuple[str, Any]],
) -> Settings | None:
    """The search that the options describe; ``None`` without ``--search``. Raises ``UserError``."""
    options = {
        "--space": space,
        "--num-samples": num_samples,
        "--objective": objectives,
        "--scheduler": scheduler,
        "--search-seed": seed,
    }
    if search is None:
        if stray := [name for name, value in options.items() if value not in (None, [])]:
            raise UserError(f"{', '.join(stray)}: belongs to --search optuna; add it, or leave out")
        return None
    if search != "optuna":
        raise UserError(f"--search {search}: there is one, optuna")
    names = tuple(objectives or DEFAULT_OBJECTIVES)
    _refuse_objectives(names)
    scheduler = scheduler or "fifo"
    if scheduler not in SCHEDULERS:
        raise UserError(f"--scheduler {scheduler}: choose one of {', '.join(SCHEDULERS)}")
    if scheduler == "asha" and names != ("val_accuracy",):
        raise UserError(
            f"--scheduler asha: it prunes by one objective that every epoch has, and this search "
            f"has {' and '.join(names)}; add --objective val_accuracy alone, or leave --scheduler "
            "out"
        )
    name, ask = function_of("--space", space or "qlora", optuna_spaces)
    return Settings(
        name=name,
        space=space or "qlora",
        ask=ask,
        objectives=names,
        num_samples=num_samples or DEFAULT_SAMPLES,
        scheduler=scheduler,
        seed=seed or 0,
        assignments=tuple(assignments),
    )


def _refuse_objectives(names: Sequence[str]) -> None:
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"--objective {name}: choose of {', '.join(OBJECTIVES)}")
    if len(set(names)) < len(names) or len(names) > 2:
        raise UserError(
            f"--objective {' --objective '.join(names)}: name one, or two different ones"
        )


def probes(settings: Settings) -> list[TrialConfig]:
    """Configurations drawn from the space at random. Raises ``UserError`` for an impossible one.

    Nothing is recorded: they are what ``preflight`` looks at before the search begins.
    """
    return _probed(settings)[0]


def asked(settings: Settings) -> dict[str, list[BaseDistribution]]:
    """What the space asks, by parameter: the ranges and choices of all probes that differ."""
    return distributions_of(_probed(settings)[1].get_trials(deepcopy=False))


def distributions_of(trials: Iterable[FrozenTrial]) -> dict[str, list[BaseDistribution]]:
    """The different ones of each parameter that ``trials`` were asked."""
    found: dict[str, list[BaseDistribution]] = {}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            if distribution not in found.setdefault(name, []):
                found[name].append(distribution)
    return found


def _probed(settings: Settings) -> tuple[list[TrialConfig], optuna.Study]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        sampler = optuna.samplers.RandomSampler(seed=settings.seed)
        study = optuna.create_study(sampler=sampler)
        found = [settings.config(study.ask()) for _ in range(PROBES)]
    finally:
        optuna.logging.set_verbosity(before)
    return list({trial.trial_id: trial for trial in found}.values()), study


def largest(trials: Sequence[TrialConfig]) -> list[TrialConfig]:
    """Of the trials with equal model, data and quantization, the one that takes most memory."""
    chosen: dict[str, TrialConfig] = {}
    for trial in sorted(
        trials, key=lambda t: (t.training.per_device_train_batch_size, t.lora.r, t.trial_id)
    ):
        chosen[f"{trial.model} {trial.dataset} {trial.data} {trial.quantization}"] = trial
    return list(chosen.values())


def refuse_grid_options(
    settings: Settings, grid: str | None, max_experiments: int | None, dry_run: bool, simulate: bool
) -> None:
    """Raises ``UserError`` for an option that a search cannot honour."""
    if grid is not None:
        raise UserError(f"--grid {grid}: a search has a --space instead; leave one of them out")
    if max_experiments is not None:
        raise UserError(f"--max-experiments {max_experiments}: a search has --num-samples instead")
    if dry_run:
        raise UserError(
            "--dry-run: a search plans a trial when the one before has ended; try --validate-only"
        )
    if simulate and (missing := [name for name in settings.objectives if name not in SIMULATED]):
        raise UserError(
            f"--objective {missing[0]}: a simulated trial has none; choose of "
            f"{', '.join(SIMULATED)}, or leave --simulate out"
        )


def continued(
    settings: Settings, study_dir: Path, *, compute_dtype: str | None
) -> tuple[Settings, list[TrialConfig]]:
    """(settings, trials so far) of a search that goes on in ``study_dir``, or begins there.

    Only a new one takes ``compute_dtype``, that of this device.
    """
    manifest = read_json(study_dir / "study.json")
    before = manifest.get("search") if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict) or not isinstance(before, dict):
        return settings._replace(compute_dtype=compute_dtype), []
    cells = [{k: v for k, v in cell.items() if k != "trial_id"} for cell in manifest["plan"]]
    settings = settings._replace(compute_dtype=before["compute_dtype"])
    return settings, [parse_trial(cell) for cell in cells]


def refuse_other_search(
    name: str, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> None:
    """Raises ``UserError`` unless both are the same search; the number of samples may differ."""
    if before is None or now is None:
        if (before is None) != (now is None):
            kinds = [
                "a grid" if kind is None else f"a search of {kind['space']}"
                for kind in (before, now)
            ]
            raise UserError(
                f"--name {name}: that study is {kinds[0]} and this one would be {kinds[1]}; choose "
                "another --name"
            )
        return
    options = {"space": "--space", "objectives": "--objective", "scheduler": "--scheduler"}
    for key, option in (options | {"seed": "--search-seed", "set": "--set"}).items():
        if before[key] != now[key]:
            was, is_ = (_words(record[key]) for record in (before, now))
            raise UserError(
                f"--name {name}: that search had {option} {was} and this one has {is_}; repeat its "
                "command to continue it, or choose another --name"
            )


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={inner}" for key, inner in value.items()) or "nothing"
    if isinstance(value, list):
        return " and ".join(entry["name"] for entry in value)
    return str(value)


def merged(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a search that is continued: what was asked so far stays, samples only grow."""
    if before is None:
        return dict(now)
    return {
        **now,
        "num_samples": max(before["num_samples"], now["num_samples"]),
        "compute_dtype": before["compute_dtype"],
        "params": before["params"],
    }
