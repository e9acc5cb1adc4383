"""All figures of a report, drawn from its findings, each with the caption that explains it."""

from __future__ import annotations

from analysis.figures import comparisons, curves, dependence, search
from analysis.figures.style import Drawn, mark_simulated, styles_of
from analysis.findings.findings import Findings
from analysis.measures.curves import curve_bands, curve_gaps
from analysis.measures.pareto import pareto_front
from analysis.statistics.cells import modes_of
from analysis.statistics.pairs import paired_differences, seed_intervals
from analysis.text import wording
from analysis.text.wording import plural, short

KEYS = (
    "accuracy_difference",
    "axes",
    "pareto_weights",
    "pareto_peak",
    "pareto_energy",
    "learning_curves",
    "learning_gap",
    "gradient_norm",
    "gradient_layers",
    "memory_ledger",
    "qlora_ratios",
    "seed_spread",
)
"""Of a grid; a search has ``search.KEYS`` and the ledger."""


def draw_all(found: Findings) -> dict[str, Drawn]:
    """Every figure by its key; empty ones say why. Simulated studies are marked in each.

    A search has its own, and of the others the ledger alone: its trials are no comparison.
    """
    with styles_of(modes_of(found.study.trials["quantization"])):
        if found.search is not None:
            drawn = search.draw(found.search)
        else:
            drawn = [_forest(found), comparisons.plot_seeds(found.seed_spread, found.seed_sds)]
            if len(found.axes.tests):
                drawn.append(dependence.plot_axes(found.axes.levels, found.axes.points))
            drawn += [*_over_epochs(found), *_pareto(found)]
            drawn.append(comparisons.plot_qlora(found.qlora, simulated=found.simulated))
        drawn.append(comparisons.plot_ledger(found.ledger))
    if found.simulated:
        drawn = [mark_simulated(figure) for figure in drawn]
    return {figure.key: figure for figure in drawn}


def _forest(found: Findings) -> Drawn:
    """Over configurations; over the seeds where there is one configuration alone."""
    table, points = found.comparison, found.differences
    margin = table["margin"].dropna()
    band = f" Shaded: the margin of ±{float(margin.iloc[0]) * 100:g} pp." if len(margin) else ""
    alone = bool((table["n_configurations"] == 1).any() and (table["n_configurations"] < 2).all())
    if alone:
        seeds = seed_intervals(found.study.trials).set_index("quantization")
        table = table.assign(
            seed_low=table["quantization"].map(seeds["ci_low"]).astype("float64"),
            seed_high=table["quantization"].map(seeds["ci_high"]).astype("float64"),
        )
        points = paired_differences(found.study.trials)
        rests = "Grey dots: the seeds of the one configuration."
        if seeds["ci_low"].notna().any():
            rests += " Dashed: the 95 % interval over them, which says nothing of other "
            rests += "configurations."
    else:
        counts = {int(count) for count in table["n_configurations"]}
        over = plural(counts.pop(), "configuration") if len(counts) == 1 else "configurations"
        rests = f"Bar: its 95 % interval over {over}, the grey dots."
    tips = [
        short(row["configuration"], 100)
        + (f" · seed {row['seed']}" if alone else f", {plural(row['n'], 'pair')}")
        + f" · {row['quantization']}: {wording.points(row['difference'])}"
        for row in points.to_dict("records")
    ]
    return comparisons.plot_forest(
        table,
        points.assign(tip=tips),
        title="What each mode costs in accuracy",
        caption=f"Difference of test accuracy to the unquantized model. {rests}{band}",
    )


def _over_epochs(found: Findings) -> list[Drawn]:
    trials, epochs = found.study.trials, found.study.epochs
    return [
        curves.plot_curves(
            curve_bands(epochs, trials),
            key="learning_curves",
            title="Learning curves",
            caption="Validation accuracy, mean over configurations and seeds; the band is one "
            "standard deviation. A curve ends where fewer than half of its trials go on.",
            label="val. accuracy, %",
            scale=100,
            empty="no trial has finished an epoch",
        ),
        curves.plot_curves(
            curve_gaps(epochs, trials),
            key="learning_gap",
            title="How far each mode runs ahead or behind",
            caption="Validation accuracy minus that of the unquantized trial of the same "
            "configuration and seed at the same epoch; the band is one standard deviation.",
            label="difference, pp",
            scale=100,
            zero=True,
            empty="no pair with an unquantized trial has finished an epoch",
        ),
        curves.plot_curves(
            curve_bands(epochs, trials, metric="grad_norm_mean"),
            key="gradient_norm",
            title="Gradient norm",
            caption="Mean global gradient norm of the trainable parameters before clipping, "
            "logarithmic; the band is one standard deviation over trials.",
            label="gradient norm",
            log=True,
            empty="no trial recorded its gradient norms",
        ),
        curves.plot_layers(found.layers),
    ]


def _pareto(found: Findings) -> list[Drawn]:
    """That of the energy only where a trial has it: most devices tell none."""
    trials = found.study.trials
    front = "Dark line: the cells that no other beats in both; differences smaller than the "
    front += "intervals above are noise."
    drawn = [
        comparisons.plot_pareto(
            pareto_front(trials),
            key="pareto_weights",
            title="Accuracy against the size of the base weights",
            caption="A mark is a configuration and mode, mean over its seeds; grey lines join the "
            f"modes of one configuration. {front}",
            label="base weights, MB",
            empty="no trial that ended well recorded its weights",
        ),
        comparisons.plot_pareto(
            pareto_front(trials, cost="peak_train_bytes"),
            key="pareto_peak",
            title="Accuracy against the peak of a training step",
            caption=f"As before, but against the measured peak of a training step. {front}",
            label="peak, MB",
            empty="no trial measured the peak of a training step on this machine",
        ),
    ]
    if len(found.energy_front):
        energy = comparisons.plot_pareto(
            found.energy_front,
            key="pareto_energy",
            title="Accuracy against the energy of training",
            caption=f"As before, but against the energy of the training. {front}",
            label="energy, kJ",
            empty="",
            one=1e3,
            words=wording.kilojoules,
        )
        drawn.append(energy)
    return drawn
