"""Pictures of a detector: its detections on images, and its run over time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

COLOURS: tuple[tuple[int, int, int], ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
)
"""RGB of the classes, repeated in turn: the palette of Okabe and Ito, which colour-blind people can
tell apart (without black, which would not show)."""


# --- detections


def draw_instances(
    image: np.ndarray,
    instances: Instances,
    class_names: Sequence[str],
    side: int = 384,
    min_score: float = 0.5,
) -> np.ndarray:
    """Draw boxes, labels and, where there are any, outlines of masks on a copy of an image.

    Args:
        image: uint8 (height, width, 3), RGB.
        instances: detections (``pred_boxes``, ``pred_classes``, ``scores``, perhaps ``pred_masks``)
            or ground truth (``gt_boxes``, ``gt_classes``, perhaps ``gt_masks``), in pixels of
            ``image``.
        class_names: names of the contiguous class ids.
        side: an image whose longer side is shorter is enlarged to about that many pixels first, so
            that labels are legible; larger images stay as they are.
        min_score: detections with a lower score are left out.

    Returns:
        uint8 (height * zoom, width * zoom, 3), RGB, with one whole-number zoom.
    """
    zoom = max(1, round(side / max(image.shape[:2])))
    canvas = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    fields = {name.split("_", 1)[-1]: value for name, value in instances.get_fields().items()}
    classes = fields["classes"].tolist()
    boxes = np.round(fields["boxes"].tensor.cpu().numpy() * zoom).astype(int)
    scores = fields["scores"].tolist() if "scores" in fields else [None] * len(classes)
    masks = fields["masks"] if "masks" in fields else [None] * len(classes)
    masks = getattr(masks, "tensor", masks)
    # the best detection last, so that its label lies on top
    order = sorted(range(len(classes)), key=lambda k: -1 if scores[k] is None else scores[k])
    order = [k for k in order if scores[k] is None or scores[k] >= min_score]
    thick = max(1, round(max(canvas.shape[:2]) / 250))
    for k in order:
        if masks[k] is not None:
            mask = np.asarray(masks[k].cpu(), dtype=np.uint8)
            mask = cv2.resize(mask, canvas.shape[1::-1], interpolation=cv2.INTER_LINEAR)
            outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
            cv2.polylines(canvas, outlines, True, _colour(classes[k]), thick, cv2.LINE_AA)
        x0, y0, x1, y1 = boxes[k].tolist()
        cv2.rectangle(canvas, (x0, y0), (x1, y1), (0, 0, 0), thick + 2)
        cv2.rectangle(canvas, (x0, y0), (x1, y1), _colour(classes[k]), thick)
    picture = Image.fromarray(canvas)
    for k in order:
        score = "" if scores[k] is None else f" {100 * scores[k]:.0f}"
        _label(picture, class_names[classes[k]] + score, boxes[k], _colour(classes[k]))
    return np.asarray(picture)


def draw_over(image: np.ndarray, instances: Instances, class_names: Sequence[str]) -> np.ndarray:
    """Draw all that a detector says with Detectron2's Visualizer: boxes, masks, keypoints, labels.

    A class has one colour on all images, :data:`COLOURS` in turn.

    Args:
        image: uint8 (height, width, 3), RGB.
        instances: detections on the CPU, in pixels of ``image``.
        class_names: names of the contiguous class ids.

    Returns:
        uint8 (height, width, 3), RGB; the image itself where there are no detections.
    """
    if not len(instances):
        return image
    classes = instances.pred_classes.tolist()
    drawn = Visualizer(image).overlay_instances(
        boxes=instances.pred_boxes,
        masks=list(instances.pred_masks.numpy()) if instances.has("pred_masks") else None,
        keypoints=instances.pred_keypoints if instances.has("pred_keypoints") else None,
        labels=[
            f"{class_names[label]} {100 * score:.0f}"
            for label, score in zip(classes, instances.scores.tolist(), strict=True)
        ],
        assigned_colors=[tuple(c / 255 for c in _colour(label)) for label in classes],
    )
    return drawn.get_image()


def _colour(label: int) -> tuple[int, int, int]:
    return COLOURS[label % len(COLOURS)]


def _font(size: float) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _label(picture: Image.Image, text: str, box: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Write ``text`` on a plate above ``box``, or inside where there is no room above."""
    pen = ImageDraw.Draw(picture)
    font = _font(max(11.0, max(picture.size) / 30))
    _, _, width, height = pen.textbbox((0, 0), text, font=font)
    x = int(np.clip(box[0] - 1, 0, max(0, picture.width - width - 4)))
    y = int(max(0, box[1] - height - 3))
    bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
    pen.rectangle((x, y, x + width + 4, y + height + 3), fill=colour)
    pen.text((x + 2, y), text, font=font, fill="black" if bright else "white")


def draw_detections(
    pairs: Iterable[tuple[np.ndarray, Instances, Instances]],
    class_names: Sequence[str],
    out_png: str | Path,
    columns: int = 2,
    side: int = 384,
    min_score: float = 0.5,
) -> Path:
    """Save one sheet of images, each twice: with its ground truth and with its detections.

    Args:
        pairs: image (uint8 RGB), ground truth and detections, as for :func:`draw_instances`.
        class_names: names of the contiguous class ids.
        out_png: where to save the sheet.
        columns: how many images beside one another.
        side: see :func:`draw_instances`.
        min_score: see :func:`draw_instances`.

    Returns:
        ``out_png`` as a path.

    Raises:
        ValueError: if there are no images.
    """
    tiles = [
        [draw_instances(image, each, class_names, side, min_score) for each in (truth, found)]
        for image, truth, found in pairs
    ]
    if not tiles:
        raise ValueError("There are no images to draw detections on: give at least one.")
    height = max(tile.shape[0] for pair in tiles for tile in pair)
    width = max(tile.shape[1] for pair in tiles for tile in pair)
    gap, head = max(4, width // 60), width // 12
    rows = -(-len(tiles) // columns)
    columns = min(columns, len(tiles))
    step_x, step_y = 2 * (width + gap) + 2 * gap, height + gap
    sheet = Image.new("RGB", (columns * step_x - gap, head + rows * step_y), "white")
    pen = ImageDraw.Draw(sheet)
    for number, pair in enumerate(tiles):
        row, column = divmod(number, columns)
        for k, (tile, title) in enumerate(zip(pair, ("ground truth", "detections"), strict=True)):
            x = gap + column * step_x + k * (width + gap)
            sheet.paste(Image.fromarray(tile), (x, head + row * step_y))
            if row == 0:
                pen.text((x, head * 0.1), title, font=_font(head * 0.62), fill="black")
    out_png = Path(out_png)
    sheet.save(out_png)
    return out_png


def draw_dataset_detections(
    cfg: CfgNode,
    model: torch.nn.Module,
    dataset: str,
    out_png: str | Path,
    count: int = 6,
    min_score: float = 0.5,
) -> Path:
    """Run a model on the first images of a registered dataset; see :func:`draw_detections`.

    Args:
        cfg: configuration that ``model`` was built from; says how images are resized.
        model: any Detectron2 model that answers with ``instances``. It is left in evaluation mode.
        dataset: name in ``DatasetCatalog``.
        out_png: where to save the sheet.
        count: how many images.
        min_score: detections with a lower score are left out.

    Returns:
        ``out_png`` as a path.
    """
    model.eval()
    mapper = DatasetMapper(cfg, is_train=False)

    def run(record: dict[str, Any]) -> tuple[np.ndarray, Instances, Instances]:
        image = read_image(record["file_name"], format="RGB")
        with torch.no_grad():
            found = model([mapper(record)])[0]["instances"].to("cpu")
        annotations = record.get("annotations", [])
        truth = annotations_to_instances(annotations, image.shape[:2], mask_format="bitmask")
        if truth.has("gt_masks") and not found.has("pred_masks"):
            truth.remove("gt_masks")
        return image, truth, found

    records = DatasetCatalog.get(dataset)[:count]
    names = MetadataCatalog.get(dataset).thing_classes
    return draw_detections(map(run, records), names, out_png, min_score=min_score)


# --- the run over time


def read_metrics(metrics_json: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the scalars that Detectron2's ``JSONWriter`` wrote.

    Where an iteration was written twice, by a run that was resumed, the later line counts. A last
    line that was cut off in writing is ignored.

    Returns:
        name -> (iterations, values), both float (n,), by increasing iteration.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    series: dict[str, dict[float, float]] = {}
    for line in Path(metrics_json).read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        iteration = record.pop("iteration")
        for name, value in record.items():
            series.setdefault(name, {})[iteration] = value
    return {
        name: (np.array(sorted(s), dtype=float), np.array([s[i] for i in sorted(s)], dtype=float))
        for name, s in series.items()
    }


def sub_network_spans(iterations: np.ndarray, phases: np.ndarray) -> list[tuple[float, float]]:
    """Where the run trained the sub-network (S2).

    Args:
        iterations: when ``repr/phase`` was written, increasing.
        phases: what it was, 0 full and 1 sub; a value holds since the entry before it.

    Returns:
        First iteration and end (exclusive) of each span.
    """
    starts = np.concatenate([[0], iterations[:-1] + 1])
    spans: list[tuple[float, float]] = []
    for start, last, phase in zip(starts, iterations, phases, strict=True):
        if phase == 1:
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((float(start), float(last) + 1))
    return spans


def learning_rate_drops(iterations: np.ndarray, rates: np.ndarray) -> list[float]:
    """Iterations by which the learning rate had fallen to less than 0.6 of the entry before."""
    return iterations[1:][rates[1:] < 0.6 * rates[:-1]].tolist()


def plot_run(metrics_json: str | Path, out_png: str | Path) -> Path:
    """Plot loss and AP over iterations, with the S2 spans shaded and learning-rate drops marked.

    Args:
        metrics_json: the run's ``metrics.json``.
        out_png: where to save the picture (any format that matplotlib knows by its suffix).

    Returns:
        ``out_png`` as a path.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no ``total_loss``.
    """
    metrics = read_metrics(metrics_json)
    if "total_loss" not in metrics:
        raise ValueError(
            f"{metrics_json} holds no total_loss: is it metrics.json of a training run?"
        )
    blue, orange, green = ([c / 255 for c in COLOURS[k]] for k in (0, 5, 2))
    spans = sub_network_spans(*metrics["repr/phase"]) if "repr/phase" in metrics else []
    drops = learning_rate_drops(*metrics["lr"]) if "lr" in metrics else []
    last = max(iterations[-1] for iterations, _ in metrics.values())
    with rc_context({"font.size": 14, "lines.linewidth": 2}):
        figure = Figure(figsize=(7, 6), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True)
        for axes in (above, below):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            for start, end in spans:
                shade = axes.axvspan(start, end, color="0.85", zorder=0, linewidth=0)
            for drop in drops:
                line = axes.axvline(drop, color="0.4", linestyle=":")
        above.plot(*metrics["total_loss"], color=blue)
        above.set(ylabel="training loss", ylim=(0, None))
        for name, label, colour, marker in (
            ("bbox/AP50", "AP50", orange, "o"),
            ("bbox/AP", "AP", green, "s"),
        ):
            if name in metrics:
                below.plot(*metrics[name], color=colour, marker=marker, label=label)
        below.set(xlabel="iteration", ylabel="held-out AP (%)", ylim=(0, 100))
        below.set_xlim(0, 1.02 * last)
        if below.get_legend_handles_labels()[0]:
            below.legend(loc="upper left")
        for start, end in spans:
            place = ((start + end) / 2, 1.01)
            above.annotate("S2", place, xycoords=("data", "axes fraction"), ha="center")
        marks = {"S2: filters dropped": shade} if spans else {}
        marks |= {"learning rate drops": line} if drops else {}
        if marks:
            above.legend(marks.values(), marks.keys(), loc="lower left")
    figure.savefig(out_png, dpi=150)
    return Path(out_png)
