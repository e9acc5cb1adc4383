"""How trials converge, one row per trial, and whether quantization shifts it.

All measures come from the epochs table and are computed for all trials at once, so that time grows
linearly. Inference is that of ``comparison.compare_modes``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.statistics.cells import modes_of, named, told_by
from analysis.statistics.comparison import compare_modes
from tune_study.folder import schema

Floats = npt.NDArray[np.float64]
PLATEAU_TOLERANCE = 0.005
"""A curve has reached its plateau within 0.5 pp of its best validation accuracy."""
METRICS = (
    "epochs_to_95",
    "plateau_epoch",
    "stopped_early",
    "train_loss_roughness",
    "train_loss_rises",
    "overfit_gap",
    "loss_gap",
)


def convergence_table(epochs: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """One row per trial of ``trials``, in its order: its axes and status, and

    - ``epochs_seen``: epochs with a row;
    - ``epochs_to_95``: first epoch with 95 % of the trial's best validation accuracy;
    - ``plateau_epoch``: first epoch within 0.5 pp of the best; missing when that is the last one
      trained, for then the curve may still have been rising;
    - ``stopped_early``: 1 when early stopping ended the trial, 0 when it ran all its epochs;
    - ``train_loss_roughness``: mean absolute second difference of the training loss over its
      range, 0 for a straight line (three epochs at least);
    - ``train_loss_rises``: share of epochs whose training loss is above the one before;
    - ``overfit_gap``: training minus validation accuracy at the best epoch, a fraction;
    - ``loss_gap``: validation minus training loss at the best epoch, nats;
    - ``note``: why a measure is missing.

    The best epoch is the first with the highest validation accuracy.
    """
    curves = _Curves(epochs, trials)
    measures = {name: np.full(len(trials), np.nan) for name in METRICS}
    measures |= _levels(curves, len(trials)) | _losses(curves, len(trials))
    status = trials["status"]
    ended = status.isin(schema.GOOD_STATUSES).to_numpy(dtype=bool)
    stopped = (status == "early_stopped").to_numpy(dtype=bool, na_value=False)
    measures["stopped_early"] = np.where(ended, stopped.astype(float), np.nan)
    seen = np.bincount(curves.trial, minlength=len(trials))
    trials = named(trials)
    about = ("trial_id", "machine", *told_by(trials), "configuration", "quantization", "seed")
    table = trials[[n for n in (*about, "status", "simulated") if n in trials]].assign(
        epochs_seen=seen, **{name: measures[name] for name in METRICS}
    )
    rising = (seen > 0) & np.isnan(measures["plateau_epoch"])
    notes = np.select(
        [seen == 0, rising & (seen < 3), rising, seen < 3],
        [
            "no epoch was trained",
            "fewer than three epochs: no plateau and no roughness",
            "within 0.5 pp of its best only at the last epoch, or without validation accuracy",
            "fewer than three epochs: no roughness",
        ],
        "",
    )
    return table.assign(note=pd.array(notes, dtype="string")).reset_index(drop=True)


class _Curves:
    """The epochs as arrays, sorted by trial and epoch.

    ``trial`` is each row's position in the trials table, ``start`` the first row of each trial
    that has any, ``owner`` that trial's position.
    """

    def __init__(self, epochs: pd.DataFrame, trials: pd.DataFrame) -> None:
        place = pd.Index(trials["trial_id"]).get_indexer(pd.Index(epochs["trial_id"]))
        number = epochs["epoch"].fillna(0).to_numpy("int64")
        rows = np.flatnonzero(place >= 0)
        rows = rows[np.lexsort((number[rows], place[rows]))]
        self.trial = place[rows]
        self.epoch = number[rows].astype("float64")
        self.start = np.flatnonzero(np.diff(self.trial, prepend=-1))
        self.owner = self.trial[self.start]
        self._epochs, self._rows = epochs, rows

    def column(self, name: str) -> Floats:
        """The column, missing as ``nan``; all missing when the table lacks it."""
        if name not in self._epochs:
            return np.full(len(self._rows), np.nan)
        return self._epochs[name].to_numpy("float64", na_value=np.nan)[self._rows]

    def per_trial(self, values: Floats) -> Floats:
        """One value per trial with epochs, spread over that trial's rows."""
        lengths = np.diff(np.append(self.start, len(self.trial)))
        return np.repeat(values, lengths)


def _levels(curves: _Curves, n_trials: int) -> dict[str, Floats]:
    """What the validation accuracy tells, shape (n_trials,) each."""
    names = ("epochs_to_95", "plateau_epoch", "overfit_gap", "loss_gap")
    found = {name: np.full(n_trials, np.nan) for name in names}
    if not len(curves.start):
        return found
    accuracy = curves.column("val_accuracy")
    reachable = np.where(np.isfinite(accuracy), accuracy, -np.inf)
    best = np.maximum.reduceat(reachable, curves.start)
    owner, known = curves.owner, np.isfinite(best)
    best_rows = curves.per_trial(np.where(known, best, np.nan))
    found["epochs_to_95"][owner] = _first(curves, reachable >= 0.95 * best_rows)
    plateau = _first(curves, reachable >= best_rows - PLATEAU_TOLERANCE)
    last = np.maximum.reduceat(curves.epoch, curves.start)
    found["plateau_epoch"][owner] = np.where(plateau < last, plateau, np.nan)
    at_best = _first(curves, reachable == best_rows)
    is_best = curves.epoch == curves.per_trial(at_best)
    for name, more, less in (
        ("overfit_gap", "train_accuracy", "val_accuracy"),
        ("loss_gap", "val_loss", "train_loss"),
    ):
        gap = curves.column(more) - curves.column(less)
        found[name][curves.trial[is_best]] = gap[is_best]
    return found


def _first(curves: _Curves, reached: npt.NDArray[np.bool_]) -> Floats:
    """First epoch of each trial at which ``reached`` holds; ``nan`` where it never does."""
    first = np.minimum.reduceat(np.where(reached, curves.epoch, np.inf), curves.start)
    return np.where(np.isfinite(first), first, np.nan)


def _losses(curves: _Curves, n_trials: int) -> dict[str, Floats]:
    """What the training loss tells, shape (n_trials,) each."""
    found = {name: np.full(n_trials, np.nan) for name in METRICS if name.startswith("train_loss")}
    if not len(curves.start):
        return found
    loss, trial = curves.column("train_loss"), curves.trial
    step, inside = np.diff(loss), np.diff(trial) == 0
    rises = (step > 0).astype("float64")
    found["train_loss_rises"] = _mean(trial[1:], rises, inside & np.isfinite(step), n_trials)
    bend = np.abs(np.diff(step))
    ok = inside[1:] & inside[:-1] & np.isfinite(bend)
    spread = np.maximum.reduceat(loss, curves.start) - np.minimum.reduceat(loss, curves.start)
    ranges = np.full(n_trials, np.nan)
    ranges[curves.owner] = np.where(spread > 0, spread, np.nan)
    found["train_loss_roughness"] = _mean(trial[2:], bend, ok, n_trials) / ranges
    return found


def _mean(
    trial: npt.NDArray[np.intp], values: Floats, use: npt.NDArray[np.bool_], n_trials: int
) -> Floats:
    """Mean per trial over the rows in ``use``; ``nan`` for a trial without any."""
    total = np.bincount(trial[use], weights=values[use], minlength=n_trials)
    count = np.bincount(trial[use], minlength=n_trials)
    return np.divide(total, count, out=np.full(n_trials, np.nan), where=count > 0)


def compare_convergence(
    table: pd.DataFrame,
    *,
    baseline: str = "none",
    confidence: float = 0.95,
    rng: np.random.Generator | None = None,
) -> pd.DataFrame:
    """Does quantization shift any measure of :func:`convergence_table`?

    The rows of ``comparison.compare_modes`` for every measure, one after another.
    ``p_holm`` is adjusted over the modes of one measure, not over the measures.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    parts = [
        compare_modes(table, metric=metric, baseline=baseline, confidence=confidence, rng=rng)
        for metric in METRICS
    ]
    return pd.concat(parts, ignore_index=True)


def early_stopping(table: pd.DataFrame) -> pd.DataFrame:
    """The early-stopping pattern per mode, from :func:`convergence_table`; it describes.

    Columns: quantization, n_trials (ended well), n_stopped, share_stopped, epochs_median,
    epochs_min, epochs_max (epochs trained), note.
    """
    rows = []
    for mode in modes_of(table["quantization"]):
        own = table[(table["quantization"] == mode) & table["stopped_early"].notna()]
        rows.append(
            {
                "quantization": mode,
                "n_trials": len(own),
                "n_stopped": int(own["stopped_early"].sum()),
                "share_stopped": own["stopped_early"].mean(),
                "epochs_median": own["epochs_seen"].median(),
                "epochs_min": own["epochs_seen"].min(),
                "epochs_max": own["epochs_seen"].max(),
                "note": "" if len(own) else "no trial of this mode ended well",
            }
        )
    return pd.DataFrame(rows)
