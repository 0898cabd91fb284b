"""Pictures of what a detector finds on images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw

from repr_det.detection.fonts import Line
from repr_det.engine.files import write_whole, writing

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
    zoom = _zoom(image, side)
    canvas = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    fields = {name.split("_", 1)[-1]: value for name, value in instances.get_fields().items()}
    classes = fields["classes"].tolist()
    boxes = np.round(fields["boxes"].tensor.cpu().numpy() * zoom).astype(int)
    scores = fields["scores"].tolist() if "scores" in fields else [None] * len(classes)
    masks = fields["masks"] if "masks" in fields else [None] * len(classes)
    masks = getattr(masks, "tensor", masks)
    # the best detection last, so that its label is on top
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


def draw_over(
    image: np.ndarray, instances: Instances, class_names: Sequence[str], side: int = 384
) -> np.ndarray:
    """Draw all that a detector says: boxes, masks, keypoints by Detectron2's Visualizer, labels.

    A class has one colour on all images, :data:`COLOURS` in turn.

    Args:
        image: uint8 (height, width, 3), RGB.
        instances: detections on the CPU, in pixels of ``image``.
        class_names: names of the contiguous class ids.
        side: see :func:`draw_instances`.

    Returns:
        uint8 (height * zoom, width * zoom, 3), RGB, with one whole-number zoom.
    """
    zoom = _zoom(image, side)
    if not len(instances):
        return image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    if image.shape[1] == 2:  # Detectron2 takes a mask two pixels wide for a list of points
        return draw_instances(image, instances, class_names, side, min_score=0)
    classes = instances.pred_classes.tolist()
    drawn = Visualizer(image, scale=zoom).overlay_instances(
        boxes=instances.pred_boxes,
        masks=list(instances.pred_masks.numpy()) if instances.has("pred_masks") else None,
        keypoints=instances.pred_keypoints if instances.has("pred_keypoints") else None,
        assigned_colors=[tuple(c / 255 for c in _colour(label)) for label in classes],
    )
    # Detectron2 would read two dollar signs as mathematics, and has one font.
    picture = Image.fromarray(drawn.get_image())
    scores, boxes = instances.scores.tolist(), instances.pred_boxes.tensor.numpy() * zoom
    for k in sorted(range(len(classes)), key=scores.__getitem__):
        text = f"{class_names[classes[k]]} {100 * scores[k]:.0f}"
        _label(picture, text, boxes[k], _colour(classes[k]))
    return np.asarray(picture)


def _zoom(image: np.ndarray, side: int) -> int:
    return max(1, round(side / max(image.shape[:2])))


def _colour(label: int) -> tuple[int, int, int]:
    return COLOURS[label % len(COLOURS)]


def _label(picture: Image.Image, text: str, box: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Write ``text`` on a plate above ``box``, or inside where there is no room above."""
    pen = ImageDraw.Draw(picture)
    line = Line(text, max(11.0, max(picture.size) / 30))
    width, height = line.width, line.height
    x = int(np.clip(box[0] - 1, 0, max(0, picture.width - width - 4)))
    y = int(max(0, box[1] - height - 3))
    bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
    pen.rectangle((x, y, x + width + 4, y + height + 3), fill=colour)
    line.draw(pen, x + 2, y + 1, "black" if bright else "white")


def draw_detections(
    examples: Sequence[Sequence[Any]],
    class_names: Sequence[str],
    out_png: Path,
    titles: Sequence[str],
) -> None:
    """Save one sheet of images below each other, each several times in a row.

    Args:
        examples: image (uint8 RGB), ground truth and detections, as for :func:`draw_instances`; at
            least one.
        class_names: names of the contiguous class ids.
        out_png: where to save the sheet.
        titles: of what is drawn of each image.

    Raises:
        UserError: the sheet cannot be written.
    """
    tiles = [
        [draw_instances(image, each, class_names) for each in drawn] for image, *drawn in examples
    ]
    height = max(tile.shape[0] for row in tiles for tile in row)
    width = max(tile.shape[1] for row in tiles for tile in row)
    gap, head = max(4, width // 60), width // 12
    size = gap + len(titles) * (width + gap), head + len(tiles) * (height + gap)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for row, drawn in enumerate(tiles):
        for k, tile in enumerate(drawn):
            sheet.paste(
                Image.fromarray(tile), (gap + k * (width + gap), head + row * (height + gap))
            )
    for k, title in enumerate(titles):
        Line(title, head * 0.62).draw(pen, gap + k * (width + gap), head * 0.1, "black")
    with writing(out_png):
        write_whole(out_png, lambda file: sheet.save(file, format="PNG"))


def ground_truth(record: dict[str, Any], masks: bool) -> Instances:
    """The objects of an image.

    Args:
        record: of a dataset in Detectron2's format.
        masks: keep masks, where there are any.
    """
    left_out = {"keypoints"} if masks else {"keypoints", "segmentation"}
    objects = [
        {key: value for key, value in entry.items() if key not in left_out}
        for entry in record.get("annotations", [])
    ]
    size = record["height"], record["width"]
    return annotations_to_instances(objects, size, mask_format="bitmask")
