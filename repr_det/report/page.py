"""The report of runs: one self-contained HTML page."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from tqdm import tqdm

from repr_det.detection.drawing import draw_instances
from repr_det.engine.files import check_output, write_text_whole
from repr_det.errors import UserError, sentence
from repr_det.report import plots
from repr_det.report.arms import REPR, STANDARD, Arms
from repr_det.report.compare import Outcome, Row, duration, outcome, seconds_per_step
from repr_det.report.examples import MIN_SCORE
from repr_det.report.gallery import FIGURES
from repr_det.report.material import Material
from repr_det.report.metrics import MAIN
from repr_det.report.run import RunFolder, rate_steps, settings_that_differ, short_names
from repr_det.tasks import CLASSIFICATION, DETECTION

_TILE, _LARGEST_TILE = 480, 1440
"""Pixels of the longer side of a held-out image: smaller ones are enlarged, larger ones shrunk."""

Missing = list[tuple[str, str]]
"""Titles of what is not shown, with the reason."""

_SECTIONS = {
    "training": (
        "Training",
        "What the runs learned, and when. In S2 a part of the filters is dropped and the rest "
        "trains alone; then they come back.",
    ),
    "dropping": (
        "What was dropped",
        "Each drop takes the filters that the run's criterion ranks highest: with ortho, those "
        "that overlap most with the others of their layer.",
    ),
    "redundancy": (
        "Redundancy",
        "RePr is meant to leave filters that say different things: less overlap of their weights, "
        "less correlation of their responses.",
    ),
    DETECTION: ("What the detectors find", "AP by class and size, and images."),
}
"""Titles and introductions of the parts of a page, by :attr:`Entry.section`."""


def write_report(
    arms: Arms,
    path: str | Path,
    *,
    images: int = 32,
    resamples: int = 1000,
) -> Path:
    """Write the report of runs, finished or not.

    What the runs have no data for is left out, and the page says why.

    Args:
        arms: of runs of one task and test set.
        path: of the page; an earlier one is replaced when the new one is whole.
        images: held-out images on which responses of filters are compared.
        resamples: of the paired bootstrap, used for detectors without seeds to pair; 0 for none.

    Returns:
        ``path``.

    Raises:
        UserError: an argument is out of range, ``path`` is a folder, or its folder does not exist.
    """
    path = Path(path)
    check_output("the report", path)
    if resamples < 0:
        raise UserError(f"The number of resamples is {resamples}. Set 0 or more.")
    write_text_whole(path, _template().render(_content(arms, images, resamples)))
    return path


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("repr_det.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    return environment.get_template("report.html")


def _content(arms: Arms, images: int, resamples: int) -> dict[str, Any]:
    material, runs = Material(arms, images), arms.runs
    found = outcome(arms, resamples)
    names = short_names(runs)
    missing: Missing = []
    figures = _figures(material, missing)
    sections = {
        name: {"name": name, "title": title, "introduction": introduction, "figures": figures[name]}
        for name, (title, introduction) in _SECTIONS.items()
    }
    if material.task == DETECTION:
        sections[DETECTION] |= _tried("Held-out images", missing, _examples, material) or {}
    now = time.strftime("%Y-%m-%d %H:%M")
    return {
        "title": f"{_listed(list(arms.groups))}: {_model(runs[0])}"
        + (f" on {runs[0].test_set}" if runs[0].test_set else ""),
        "subtitle": f"{material.task.capitalize()}. Written {now} by repr_det.",
        "summary": _summary(arms, found, names),
        "iteration": None if found.iteration is None else f"{found.iteration:,}",
        "test_set": runs[0].test_set,
        "several": any(len(group) > 1 for group in arms.groups.values()),
        "arms": list(arms.groups),
        "level": f"{100 * found.level:.4g}",
        "rows": [_cells(row) for row in found.rows.values()],
        "runs": _runs(arms, names),
        "schedule": _schedule(arms),
        "differences": list(settings_that_differ(runs).items()),
        "sections": [s for s in sections.values() if s["figures"] or "examples" in s],
        "columns": 1 + len(arms.groups),
        "missing": missing,
    }


def _tried(
    title: str, missing: Missing, make: Callable[[Material], Any], material: Material
) -> Any:
    """What is made of the material; None where it cannot be, with the reason in ``missing``."""
    try:
        return make(material)
    except UserError as error:
        missing.append((title, sentence(error)))
        return None


def _figures(material: Material, missing: Missing) -> dict[str, list[dict[str, str]]]:
    """The figures that say anything about the runs, by section."""
    found: dict[str, list[dict[str, str]]] = {section: [] for section in _SECTIONS}
    wanted = [(name, entry) for name, entry in FIGURES.items() if entry.applies(material.arms)]
    for name, entry in tqdm(wanted, "Figures", disable=None):  # a bar on a terminal
        drawn = _tried(entry.title, missing, entry.draw, material)
        if drawn is not None:
            source = plots.data_uri(plots.as_svg(drawn.figure), "image/svg+xml")
            found[entry.section].append(
                {"name": name, "title": entry.title, "caption": drawn.caption, "source": source}
            )
    return found


def _examples(material: Material) -> dict[str, Any]:
    arms, rows = list(material.arms.groups), []
    examples = material.examples  # reads the dataset, and only then its classes are known
    names = material.class_names
    for example in examples:
        captions = ["ground truth"] + [
            f"{arm}: {count} {'mistake' if count == 1 else 'mistakes'}"
            for arm, count in zip(arms, example.mistakes, strict=True)
        ]
        rows.append(
            [
                {
                    "source": _jpeg(draw_instances(example.image, each, names, _TILE, MIN_SCORE)),
                    "caption": caption,
                }
                for each, caption in zip([example.truth, *example.found], captions, strict=True)
            ]
        )
    which = (
        f"Where the two differ most: first images on which {arms[1]} makes fewer mistakes, then "
        f"images on which {arms[0]} does, as many of each as there are."
        if len(arms) == 2
        else "The first images of the test set."
    )
    caption = (
        f"{which} Shown are detections with a score of {100 * MIN_SCORE:.0f} % or more; a mistake "
        "is an object missed or a detection that matches none, at IoU 0.5."
    )
    return {"examples": rows, "examples_caption": caption}


def _jpeg(picture: np.ndarray) -> str:
    shrink = _LARGEST_TILE / max(picture.shape[:2])
    if shrink < 1:
        picture = cv2.resize(picture, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    return plots.data_uri(encoded.tobytes(), "image/jpeg")


# --- words and numbers


def _model(run: RunFolder) -> str:
    model = run.cfg.MODEL
    if run.task == CLASSIFICATION:
        return model.CLASSIFIER.NAME
    backbone = model.BACKBONE.NAME
    if "resnet" in backbone:
        backbone = f"R{model.RESNETS.DEPTH}{'-FPN' if 'fpn' in backbone else ''}"
    architecture = model.META_ARCHITECTURE
    if architecture == "GeneralizedRCNN":
        kind = "Keypoint" if model.KEYPOINT_ON else "Mask" if model.MASK_ON else "Faster"
        architecture = f"{kind} R-CNN"
    return f"{architecture} {backbone}"


def _cells(row: Row) -> dict[str, Any]:
    """An arm's value, and of all but the baseline the difference and its interval."""
    digits = 1 if row.unit else 3
    cells = []
    for name, arm in row.arms.items():
        spread = "" if arm.deviation is None else f" ± {arm.deviation:.{digits}f}"
        cells.append(f"{arm.mean:.{digits}f}{spread}")
        if (found := row.differences.get(name)) is not None:
            cells.append(f"{found.mean:+.{digits}f}")
            ends = (found.low, found.high)
            cells.append("" if None in ends else " to ".join(f"{e:+.{digits}f}" for e in ends))
    return {"title": f"{row.title} ({row.unit})" if row.unit else row.title, "cells": cells}


def _how(arm: str) -> str:
    return {REPR: "With RePr", STANDARD: "Without RePr"}.get(arm, f"With {arm}")


def _summary(arms: Arms, found: Outcome, names: Sequence[str]) -> list[str]:
    sentences = []
    row = found.rows.get(MAIN[arms.runs[0].task])
    if row is not None and not arms.others:
        value = row.arms[arms.baseline].mean
        sentences.append(f"{_how(arms.baseline)} the {row.title} was {value:.1f} %.")
    elif row is not None:
        sentences += [_difference(arms, row, arm, found.level) for arm in arms.others]
    sentences.append(found.interval)
    unfinished = [n for run, n in zip(arms.runs, names, strict=True) if not run.finished]
    if unfinished:
        sentences.append(
            f"Not finished, still going or stopped: {', '.join(unfinished)}. The page shows what "
            "was recorded so far."
        )
    return sentences


def _difference(arms: Arms, row: Row, arm: str, level: float) -> str:
    difference = row.differences[arm]
    points = f"{abs(difference.mean):.1f}"
    way = f"{points} points {'higher' if difference.mean > 0 else 'lower'}"
    without = "without it" if (arms.baseline, arm) == (STANDARD, REPR) else f"with {arms.baseline}"
    text = (
        f"{_how(arm)} the {row.title} was {row.arms[arm].mean:.1f} %, {without} "
        f"{row.arms[arms.baseline].mean:.1f} %: {'the same' if points == '0.0' else way}"
    )
    if difference.low is None:
        return f"{text}."
    text += (
        f", with a {100 * level:.4g} % interval from {difference.low:+.1f} to "
        f"{difference.high:+.1f}"
    )
    if difference.low <= 0 <= difference.high:
        text += " that does not tell which is better"
    return f"{text}."


def _runs(arms: Arms, names: Sequence[str]) -> list[dict[str, str | int]]:
    owners = [(i, arm) for i, (arm, group) in enumerate(arms.groups.items()) for _ in group]
    rows = []
    for run, name, (number, arm) in zip(arms.runs, names, owners, strict=True):
        steps = seconds_per_step(run)
        step = ", ".join(f"{1000 * value:,.0f} ms in {phase}" for phase, value in steps.items())
        rows.append(
            {
                "arm": arm,
                "number": number,
                "name": name,
                "state": f"{'finished' if run.finished else 'not finished'}, "
                f"{run.iterations:,} iterations",
                "duration": duration(run),
                "step": step.removesuffix(" in full") if list(steps) == ["full"] else step,
            }
        )
    return rows


def _schedule(arms: Arms) -> list[str]:
    """How the first run of each arm trained, once where several trained alike."""
    first = {name: group[0] for name, group in arms.groups.items()}
    with_repr = {name: run for name, run in first.items() if run.cfg.REPR.ENABLED}
    sentences = []
    for describe, runs in ((_training, first), (_cycles, with_repr)):
        said = {name: describe(run) for name, run in runs.items()}
        if len(distinct := set(said.values())) == 1:
            sentences += distinct
        else:
            sentences += [f"{name}: {sentence}" for name, sentence in said.items()]
    return sentences


def _training(run: RunFolder) -> str:
    keys, epochs = run.cfg.SOLVER, run.cfg.SOLVER.get("MAX_EPOCHS", 0)
    length = f"{epochs:g} epochs" if epochs else f"{keys.MAX_ITER:,} iterations"
    steps, unit = rate_steps(keys, run.iterations if epochs else keys.MAX_ITER), "iteration"
    if keys.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and keys.get("STEPS_EPOCHS", ()):
        unit = "epoch"
        steps = [step for step in keys.STEPS_EPOCHS if not epochs or step < epochs]
    falls = f", {keys.LR_SCHEDULER_NAME}" if steps is None else ""
    if steps:
        said = "" if bool(epochs) == (unit == "epoch") else f"{unit} "
        falls = f", divided by {1 / keys.GAMMA:g} at {said}{_listed(steps)}"
    return (
        f"Trained on {', '.join(run.cfg.DATASETS.TRAIN)} for {length} of {keys.IMS_PER_BATCH} "
        f"images; {keys.get('OPTIMIZER', 'SGD')}, learning rate {keys.BASE_LR:g}{falls}."
    )


def _cycles(run: RunFolder) -> str:
    settings = run.cfg.REPR
    as_they_were = settings.REINIT.DIRECTION == "previous"
    how = "as they were" if as_they_were else "orthogonal to what is there"
    return (
        f"RePr: {settings.N} cycles of {settings.S1:g} {settings.UNIT}s of the full network "
        f"(S1) and {settings.S2:g} of the sub-network (S2); each drop takes "
        f"{100 * settings.PRUNE_RATIO:g} % of all filters, ranked by {settings.CRITERION}, and "
        f"at most {100 * settings.MAX_LAYER_RATIO:g} % of a layer. Filters return {how}."
    )


def _listed(values: Sequence[Any]) -> str:
    *most, last = (value if isinstance(value, str) else f"{value:,.10g}" for value in values)
    return f"{', '.join(most)} and {last}" if most else last
