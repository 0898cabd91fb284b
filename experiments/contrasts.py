"""What the studies of PROTOCOL.md found: their contrasts on the test set, and their pictures."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.protocol import (
    CHOICE,
    CHOICE_SEED,
    STANDARD,
    STUDIES,
    TEN_SEEDS,
    TEST,
    THREE_SEEDS,
    Cell,
    Values,
    cells_on_test_set,
    choice_cells,
    chosen,
)
from experiments.summarise import mean_and_spread, mean_difference
from repr_det.detection.bootstrap import corrected_level
from repr_det.report import plots

BySeed = dict[int, float]

_WORST = "noise"
"""The study whose third primary contrast is of the worst numbers over the grid."""

_AXES = {
    "finetune": ("AP of boxes, %", "learning rate"),
    "noise": ("top-1 accuracy, %", "weight decay"),
}


@dataclass(frozen=True)
class Contrast:
    """An arm minus standard training, paired over seeds.

    Attributes:
        label: the setting, the arm and the values that both chose.
        standard: what counts of standard training, in %, by seed.
        arm: the same of the arm.
        planned: the number of seeds that the protocol asks for.
        primary: declared before the first run; all others are exploration.
    """

    label: str
    standard: BySeed
    arm: BySeed
    planned: int
    primary: bool


def contrasts(study: str, values: Values) -> list[Contrast]:
    """The contrasts of a study whose runs are known, recorded or not; the primary ones first.

    Args:
        study: name.
        values: of all recorded runs. A run that failed is left out with its pair.
    """
    found = []
    for setting in STUDIES[study].settings:
        best = chosen(study, setting, values)
        if not best or STANDARD not in best:
            continue
        standard = best.pop(STANDARD)
        primary = {cell.arm for cell in cells_on_test_set(study, setting, values, "primary")}
        for arm, cell in best.items():
            found.append(
                Contrast(
                    f"{setting}: {arm} ({cell.value:g}) - {STANDARD} ({standard.value:g})",
                    _by_seed(standard, values),
                    _by_seed(cell, values),
                    len(TEN_SEEDS if arm in primary else THREE_SEEDS),
                    arm in primary,
                )
            )
        for arm in primary & best.keys() if study == _WORST else ():
            worst = [_worst_by_seed(study, setting, of, values) for of in (STANDARD, arm)]
            name = f"{setting}: {arm} - {STANDARD}, each at its worst weight decay"
            found.append(Contrast(name, *worst, len(TEN_SEEDS), True))
    return sorted(found, key=lambda contrast: not contrast.primary)


def _by_seed(cell: Cell, values: Values) -> BySeed:
    """What the test set says of runs like this one."""
    return {
        c.seed: value
        for c, value in values.items()
        if (c.stage, c.study, c.row) == (TEST, cell.study, cell.row) and value is not None
    }


def _worst_by_seed(study: str, setting: str, arm: str, values: Values) -> BySeed:
    """The lowest number over the grid of each seed of which the whole grid is recorded."""
    grid = [
        _by_seed(Cell(study, TEST, setting, arm, value), values) for value in STUDIES[study].grid
    ]
    seeds = set(TEN_SEEDS).intersection(*grid)
    return {seed: min(of[seed] for of in grid) for seed in seeds}


def study_in_markdown(study: str, values: Values, picture: str) -> str:
    """What a study found, as a section of the page of results.

    Args:
        study: name.
        values: of all recorded runs.
        picture: address of the figure of :func:`over_grid`.
    """
    setting = next(iter(STUDIES[study].settings))
    _, xlabel = _AXES[study]
    return (
        f"## Study {study}: what it found\n\n"
        f"![Every arm by {xlabel}, one seed, held-out training images]({picture})\n\n"
        f"Setting `{setting}`, seed {CHOICE_SEED}, `{STUDIES[study].datasets[CHOICE]}`. Each arm "
        "takes its best value to the test set.\n\n"
        f"{_contrasts_in_markdown(study, values)}\n"
    )


def _contrasts_in_markdown(study: str, values: Values) -> str:
    found = [c for c in contrasts(study, values) if c.standard.keys() & c.arm.keys()]
    dataset, metric = STUDIES[study].datasets[TEST], STUDIES[study].metric
    if not found:
        return f"No pair is recorded on `{dataset}` yet."
    # All that are planned count, recorded or not.
    explored = sum(len(s.arms) - 1 for s in STUDIES[study].settings.values()) - 1
    lines = [_line(contrast, explored) for contrast in found]
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    caption = (
        f"{'AP of boxes' if metric == 'AP' else 'Accuracy'} after the last step on `{dataset}`, "
        "in %: mean ± standard deviation over the seeds that both arms have. Seeds: recorded, of "
        "those planned. After an arm: the value that it chose on held-out training images. "
        "Intervals are Student's t at 95 %."
    )
    if not all(contrast.primary for contrast in found):
        caption += (
            f" Exploration answers no question that was declared beforehand. Its intervals are at "
            f"{corrected_level(explored):.2%}, Bonferroni's correction for {explored} of them."
        )
    if any(len(c.standard.keys() & c.arm.keys()) < c.planned for c in found):
        caption += " Where seeds are missing, this is a look before the end: nothing is claimed."
    return f"{table}\n\n{caption}"


def _line(contrast: Contrast, explored: int) -> dict[str, str]:
    level = 0.95 if contrast.primary else corrected_level(explored)
    seeds = sorted(contrast.standard.keys() & contrast.arm.keys())
    return {
        "": contrast.label,
        "Kind": "primary" if contrast.primary else "exploration",
        "Standard": mean_and_spread([contrast.standard[seed] for seed in seeds]),
        "Arm": mean_and_spread([contrast.arm[seed] for seed in seeds]),
        "Seeds": f"{len(seeds)} of {contrast.planned}",
        "Difference and interval": mean_difference(contrast.arm, contrast.standard, level),
        "By seed": ", ".join(f"{contrast.arm[s] - contrast.standard[s]:+.1f}" for s in seeds),
    }


def over_grid(study: str, values: Values) -> Figure:
    """Draw every arm of the primary setting over the grid, on the held-out training images.

    Args:
        study: name.
        values: of all recorded runs.
    """
    setting = next(iter(STUDIES[study].settings))
    found = [(c, values[c]) for c in choice_cells(study, setting) if values.get(c) is not None]
    ylabel, xlabel = _AXES[study]
    lines = pd.Series({(c.value, c.arm): value for c, value in found}).unstack(sort=False)
    return plots.over_values(lines.sort_index().rename_axis(xlabel), ylabel)
