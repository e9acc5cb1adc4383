"""How trials converge, one row per trial, and whether quantization shifts it.

All measures come from the epochs table and are computed for all trials at once. Inference is
that of ``comparison.compare_modes``.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.statistics.cells import modes_of, named, told_by
from analysis.statistics.comparison import compare_modes
from tune_study.folder import schema

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
    curves = _curves(epochs, trials)
    places = range(len(trials))
    found = pd.concat([_levels(curves), _losses(curves)], axis=1).reindex(places)
    seen = curves.groupby("trial").size().reindex(places, fill_value=0)
    rising = (seen > 0) & found["plateau_epoch"].isna()
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
    trials = named(trials).reset_index(drop=True)
    stopped = (trials["status"] == "early_stopped").astype("float64")
    found["stopped_early"] = stopped.where(trials["status"].isin(schema.GOOD_STATUSES))
    about = ("trial_id", "machine", *told_by(trials), "configuration", "quantization", "seed")
    table = trials[[name for name in (*about, "status", "simulated") if name in trials]]
    return table.assign(
        epochs_seen=seen, **found[list(METRICS)], note=pd.array(notes, dtype="string")
    )


def _curves(epochs: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """The epochs in order, as floats; ``trial`` is the position in the table ``trials``."""
    place = pd.Index(trials["trial_id"]).get_indexer(pd.Index(epochs["trial_id"]))
    columns = ["epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy"]
    curves = epochs.reindex(columns=columns).astype("float64").assign(trial=place)
    return curves[place >= 0].sort_values(["trial", "epoch"], ignore_index=True)


def _levels(curves: pd.DataFrame) -> pd.DataFrame:
    """What the validation accuracy tells, by trial."""
    accuracy, by_trial = curves["val_accuracy"], curves.groupby("trial")
    best = by_trial["val_accuracy"].transform("max")

    def first(reached: pd.Series) -> pd.DataFrame:
        return curves[reached].drop_duplicates("trial").set_index("trial")

    plateau = first(accuracy >= best - PLATEAU_TOLERANCE)["epoch"]
    at_best = first(accuracy == best)
    return pd.DataFrame(
        {
            "epochs_to_95": first(accuracy >= 0.95 * best)["epoch"],
            "plateau_epoch": plateau.where(plateau.lt(by_trial["epoch"].max())),
            "overfit_gap": at_best["train_accuracy"] - at_best["val_accuracy"],
            "loss_gap": at_best["val_loss"] - at_best["train_loss"],
        }
    )


def _losses(curves: pd.DataFrame) -> pd.DataFrame:
    """What the training loss tells, by trial."""
    loss, trial = curves["train_loss"], curves["trial"]
    by_trial = loss.groupby(trial)
    step = by_trial.diff()
    bend = step.groupby(trial).diff().abs()
    span = (by_trial.max() - by_trial.min()).mask(loss.isna().groupby(trial).any())
    return pd.DataFrame(
        {
            "train_loss_rises": (step > 0)[np.isfinite(step)].groupby(trial).mean(),
            "train_loss_roughness": bend[np.isfinite(bend)].groupby(trial).mean()
            / span.where(span > 0),
        }
    )


def compare_convergence(table: pd.DataFrame) -> pd.DataFrame:
    """Does quantization shift any measure of :func:`convergence_table`?

    The rows of ``comparison.compare_modes`` for every measure, one after another.
    ``p_holm`` is adjusted over the modes of one measure, not over the measures.
    """
    rng = np.random.default_rng(0)
    parts = [compare_modes(table, metric=metric, rng=rng) for metric in METRICS]
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
