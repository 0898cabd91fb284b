"""What the studies of PROTOCOL.md found: their choices, contrasts on the test set, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from experiments.run_studies import AGAIN, metric_of, record_path, recorded_cell, value_of
from experiments.runs import read_record
from experiments.summarise import MEASURES, mean_and_spread, mean_difference
from experiments.tables import RECORDS, Row, Table
from repr_det.detection.bootstrap import corrected_level
from repr_det.report import plots

BySeed = dict[int, float]

_CHOSEN = {"finetune": "learning rate", "noise": "weight decay"}
"""By study, what every arm chooses."""

_WORDS = {
    "finetune": "A setting is a number of images and of steps. `repr`: the default. `repr-heads`: "
    "RePr in the pyramid and the heads alone. `previous-3`, `previous-7`: dropped filters return "
    "as they were, in 3 or 7 cycles.",
    "noise": "A setting is the share of random labels in %. `repr`: the default. `repr-50`: p 50 % "
    "and `MAX_LAYER_RATIO` 80 %. `previous`: dropped filters return as they were.",
}

WORST = ("noise", "40")
"""The study and setting of the contrast between the worst numbers over the grid."""


@dataclass(frozen=True)
class Contrast:
    """An arm minus standard training, paired over seeds.

    Attributes:
        label: the setting, the arm and the values that both chose.
        standard: what counts of standard training, in %, by seed.
        arm: the same of the arm.
        planned: the number of seeds that the protocol asks for.
        missing: of them, those of which a run is not recorded yet. A run that failed is recorded.
        primary: declared before the first run; all others are exploration.
    """

    label: str
    standard: BySeed
    arm: BySeed
    planned: int
    missing: int
    primary: bool

    @property
    def seeds(self) -> list[int]:
        """Those that both arms have."""
        return sorted(self.standard.keys() & self.arm.keys())


def choice_tables(values: Values) -> list[Table]:
    """A table for each study, of the runs that choose, as far as they are recorded."""
    found = []
    for name, study in STUDIES.items():
        cells = [c for setting in study.settings for c in choice_cells(name, setting)]
        rows = [
            Row(
                cell.row,
                f"{cell.setting}: {cell.arm}, {cell.value:g}",
                None,
                study.config,
                standard=None if cell.arm == STANDARD else replace(cell, arm=STANDARD).row,
            )
            for cell in cells
            if cell in values
        ]
        note = f"{_WORDS[name]} A gain is over standard training at the same {_CHOSEN[name]}."
        title = f"Study {name}: the choice, on `{study.datasets[CHOICE]}`"
        if rows:
            found.append(Table(f"{name}-{CHOICE}", title, tuple(rows), metric_of(name), (note,)))
    return found


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
            label = f"{setting}: {arm} ({cell.value:g}) - {STANDARD} ({standard.value:g})"
            seeds = TEN_SEEDS if arm in primary else THREE_SEEDS
            found.append(_contrast(label, [standard], [cell], seeds, values, arm in primary))
        for arm in primary & best.keys() if (study, setting) == WORST else ():
            found.extend(_contrasts_over_grid(standard, best[arm], values))
    return sorted(found, key=lambda contrast: not contrast.primary)


def _contrasts_over_grid(standard: Cell, arm: Cell, values: Values) -> list[Contrast]:
    """Both at their worst values, which is primary; then at each value that not both chose."""
    chosen_by = _CHOSEN[arm.study]
    label = f"{arm.setting}: {arm.arm} - {STANDARD}"
    grid = STUDIES[arm.study].grid
    pairs = [(replace(standard, value=value), replace(arm, value=value)) for value in grid]
    worst = f"{label}, each at its worst {chosen_by}"
    return [
        _contrast(worst, *zip(*pairs, strict=True), TEN_SEEDS, values, True),
        *(
            _contrast(f"{label}, {chosen_by} {of.value:g}", [of], [cell], TEN_SEEDS, values, False)
            for of, cell in pairs
            if (of, cell) != (standard, arm)
        ),
    ]


def _contrast(
    label: str,
    standard: Sequence[Cell],
    arm: Sequence[Cell],
    seeds: Sequence[int],
    values: Values,
    primary: bool,
) -> Contrast:
    """Of each arm the lowest number counts among some runs that have a seed in common."""
    missing = [s for s in seeds if any(c not in values for c in _tested((*standard, *arm), s))]
    numbers = (
        {s: min(found) for s in seeds if (found := _numbers(_tested(of, s), values))}
        for of in (standard, arm)
    )
    return Contrast(label, *numbers, len(seeds), len(missing), primary)


def _tested(cells: Iterable[Cell], seed: int) -> list[Cell]:
    return [replace(cell, stage=TEST, seed=seed) for cell in cells]


def _numbers(cells: Sequence[Cell], values: Values) -> list[float]:
    """Of all cells; empty where one is missing or failed."""
    found = [value for cell in cells if (value := values.get(cell)) is not None]
    return found if len(found) == len(cells) else []


def study_in_markdown(study: str, values: Values, picture: str) -> str:
    """What a study found, as a section of the page of results.

    Args:
        study: name.
        values: of all recorded runs.
        picture: address of the figure of :func:`over_grid`.
    """
    setting = next(iter(STUDIES[study].settings))
    parts = [
        f"## Study {study}: what it found",
        f"![Every arm by {_CHOSEN[study]}, one seed, held-out training images]({picture})",
        f"Setting `{setting}`, seed {CHOICE_SEED}, `{STUDIES[study].datasets[CHOICE]}`. Each arm "
        "takes its best value to the test set.",
        _contrasts_in_markdown(study, values),
        _odd_runs(study, values),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _contrasts_in_markdown(study: str, values: Values) -> str:
    known = contrasts(study, values)
    found = [contrast for contrast in known if contrast.seeds]
    dataset = STUDIES[study].datasets[TEST]
    if not found:
        return f"No pair is recorded on `{dataset}` yet."
    # All that are planned count, recorded or not: each arm of each setting but the primary one, and
    # what is explored over ten seeds.
    explored = sum(len(s.arms) - 1 for s in STUDIES[study].settings.values()) - 1
    explored += sum(not c.primary and c.planned == len(TEN_SEEDS) for c in known)
    lines = [_line(contrast, corrected_level(explored)) for contrast in found]
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    caption = [
        f"Numbers: {MEASURES[metric_of(study)].axis}, after the last step on `{dataset}`; mean ± "
        "standard deviation over the seeds that both arms have. Seeds: recorded, of those planned. "
        f"In brackets: the {_CHOSEN[study]} that an arm chose on held-out training images. "
        "Intervals are Student's t."
    ]
    if not all(contrast.primary for contrast in found):
        caption.append(
            "Exploration answers no question that was declared beforehand: nothing is claimed from "
            f"it. Its intervals have Bonferroni's correction for {explored} of them."
        )
    if any(contrast.missing for contrast in found):
        caption.append("Where runs are missing, this is a look before the end: nothing is claimed.")
    waiting = [c.label for c in known if c.primary and not c.seeds]
    if waiting:
        caption.append(f"Primary and without a pair yet: {', '.join(waiting)}.")
    return f"{table}\n\n{' '.join(caption)}"


def _line(contrast: Contrast, explored: float) -> dict[str, str]:
    """The line of a contrast; ``explored`` is the level of the intervals of exploration."""
    level = 0.95 if contrast.primary else explored
    pairs = [(contrast.standard[seed], contrast.arm[seed]) for seed in contrast.seeds]
    return {
        "": contrast.label,
        "Kind": "primary" if contrast.primary else "exploration",
        "Standard": mean_and_spread([standard for standard, _ in pairs]),
        "Arm": mean_and_spread([arm for _, arm in pairs]),
        "Seeds": f"{len(pairs)} of {contrast.planned}",
        "Difference": mean_difference(contrast.arm, contrast.standard, level),
        "Interval": f"{100 * level:.4g} %",
        "By seed": ", ".join(f"{arm - standard:+.1f}" for standard, arm in pairs),
    }


def again_in_markdown(output: Path) -> str:
    """A section for the runs that were trained once more; empty without any.

    Args:
        output: folder of all records.
    """
    lines = []
    folders = output, output / AGAIN
    for again in sorted((output / AGAIN).glob(f"*/*/{RECORDS}")):
        cell = recorded_cell(again)
        records = [read_record(record_path(cell, folder)) for folder in folders]
        numbers = [value_of(record, cell) for record in records]
        lines.append(
            {
                "Run": str(cell),
                "Recorded": f"{numbers[0]:.4f}",
                "Again": f"{numbers[1]:.4f}",
                "Difference": f"{numbers[1] - numbers[0]:+.4f}",
                "Commits": ", ".join(f"`{record['commit'][:7]}`" for record in records),
                "Processors": ", ".join(dict.fromkeys(record["device"] for record in records)),
            }
        )
    if not lines:
        return ""
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    return (
        f"## Runs of the studies, trained once more\n\n{table}\n\nThe number of a run in %, as "
        "recorded and with the code of a later commit. Processors round differently, so a "
        "difference is expected where there are two.\n"
    )


def _odd_runs(study: str, values: Values) -> str:
    """A sentence for runs that failed, and one for those that diverged; empty without any."""
    counted = STUDIES[study].diverged
    kinds = {
        "Failed twice, and left out with their pairs": None,
        f"Counted as {counted:g} %, as runs that diverge are": counted,
    }
    found = {
        words: [str(c) for c, value in values.items() if c.study == study and value == number]
        for words, number in kinds.items()
    }
    return " ".join(f"{words}: {', '.join(runs)}." for words, runs in found.items() if runs)


def over_grid(study: str, values: Values) -> Figure:
    """Draw every arm of the primary setting over the grid, on the held-out training images.

    Args:
        study: name.
        values: of all recorded runs.
    """
    setting = next(iter(STUDIES[study].settings))
    table = pd.DataFrame(index=pd.Index(STUDIES[study].grid, name=_CHOSEN[study]))
    for cell in choice_cells(study, setting):
        table.loc[cell.value, cell.arm] = values.get(cell)
    return plots.over_values(table.astype(float), MEASURES[metric_of(study)].axis)
