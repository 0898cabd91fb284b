from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from repr_det.detection.drawing import (
    COLOURS,
    draw_detections,
    draw_instances,
    draw_over,
    ground_truth,
)

# pycocotools and numpy 2, in mask.decode
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ["disc", "star"]


def grey(height: int = 40, width: int = 60) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def found(boxes: list[list[float]], classes: list[int], scores: list[float]) -> Instances:
    return Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        pred_classes=torch.tensor(classes, dtype=torch.long),
        scores=torch.tensor(scores),
    )


def truth(boxes: list[list[float]], classes: list[int]) -> Instances:
    return Instances(
        (40, 60), gt_boxes=Boxes(torch.tensor(boxes)), gt_classes=torch.tensor(classes)
    )


def has_colour(picture: np.ndarray, label: int) -> np.ndarray:
    """Where a picture has the colour of a class; anti-aliasing changes it a little."""
    return (np.abs(picture.astype(int) - COLOURS[label]) < 30).all(axis=2)


def test_only_small_images_are_enlarged():
    nothing = found([], [], [])
    assert draw_instances(grey(), nothing, NAMES, side=240).shape == (160, 240, 3)
    assert draw_instances(grey(400, 600), nothing, NAMES, side=240).shape == (400, 600, 3)


def test_a_box_has_its_class_colour_at_its_place():
    image = grey()
    picture = draw_instances(image, found([[10, 20, 40, 35]], [1], [0.9]), NAMES, side=240)
    coloured = has_colour(picture, 1)
    zoom = 4
    assert coloured[35 * zoom, 15 * zoom : 35 * zoom].all()  # lower edge
    assert coloured[22 * zoom : 33 * zoom, 10 * zoom].all()  # left edge
    assert coloured[22 * zoom : 33 * zoom, 40 * zoom].all()  # right edge
    inside = picture[23 * zoom : 33 * zoom, 12 * zoom : 38 * zoom]
    assert (inside == 128).all()
    assert not has_colour(picture, 0).any()
    assert (image == 128).all()  # drawn on a copy


def test_unsure_detections_are_left_out_and_ground_truth_never_is():
    plain = draw_instances(grey(), found([], [], []), NAMES)
    box = [[10.0, 20.0, 40.0, 35.0]]
    assert (draw_instances(grey(), found(box, [0], [0.49]), NAMES) == plain).all()
    assert has_colour(draw_instances(grey(), found(box, [0], [0.5]), NAMES), 0).any()
    assert has_colour(draw_instances(grey(), truth(box, [0]), NAMES), 0).any()


def test_labels_stay_inside_the_picture():
    corners = [[0.0, 0.0, 8.0, 8.0], [52.0, 0.0, 60.0, 8.0]]
    picture = draw_instances(grey(), found(corners, [0, 1], [0.9, 0.9]), NAMES, side=240)
    for label, window in ((0, np.s_[:16, :30]), (1, np.s_[:16, -30:])):
        assert has_colour(picture, label)[window].mean() > 0.3  # the plate behind the text


def test_masks_are_outlined():
    detected = found([[10, 10, 50, 30]], [0], [0.9])
    mask = torch.zeros(1, 40, 60, dtype=torch.bool)
    mask[0, 15:25, 20:40] = True
    detected.pred_masks = mask
    picture = draw_instances(grey(), detected, NAMES, side=60)
    coloured = has_colour(picture, 0)
    assert coloured[15, 20:40].all()
    assert coloured[15:25, 20].all()
    assert not coloured[17:23, 22:38].any()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_masks_of_very_narrow_images_are_drawn(width: int) -> None:
    instances = found([[0, 5, width, 30]], [1], [0.9])
    instances.pred_masks = torch.ones(1, 40, width, dtype=torch.bool)
    drawn = draw_over(grey(width=width), instances, NAMES)
    assert drawn.shape == (40 * 10, width * 10, 3) and (drawn != 128).any()


def test_the_sheet_shows_each_image_beside_its_ground_truth(tmp_path: Path):
    box = [[10.0, 10.0, 40.0, 30.0]]
    pairs = [(grey(), truth(box, [0]), found(box, [1], [0.9])) for _ in range(3)]
    path = tmp_path / "sheet.png"
    draw_detections(pairs, NAMES, path, ("ground truth", "detections"))
    sheet = cv2.imread(str(path))[..., ::-1]
    for third in np.array_split(sheet, 3):
        left, right = np.array_split(third, 2, axis=1)
        assert has_colour(left, 0).any() and not has_colour(left, 1).any()
        assert has_colour(right, 1).any() and not has_colour(right, 0).any()


def test_objects_of_which_some_have_masks() -> None:
    box = {"bbox": [5, 5, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    mask = {"segmentation": [[5, 5, 15, 5, 15, 15]]}
    record = {"height": 40, "width": 60, "annotations": [box | mask, box | {"segmentation": []}]}
    truth = ground_truth(record, masks=False)
    assert truth.gt_boxes.tensor.tolist() == [[5, 5, 15, 15]] * 2 and not truth.has("gt_masks")


def test_a_sheet_shows_several_detectors_of_one_image(tmp_path: Path):
    box = [[10.0, 10.0, 40.0, 30.0]]
    example = (grey(), truth(box, [0]), found(box, [1], [0.9]), found([], [], []))
    titles = ("ground truth", "first", "second")
    path = tmp_path / "sheet.png"
    draw_detections([example], NAMES, path, titles)
    thirds = np.array_split(cv2.imread(str(path))[..., ::-1], 3, axis=1)
    assert [has_colour(third, 0).any() for third in thirds] == [True, False, False]
    assert [has_colour(third, 1).any() for third in thirds] == [False, True, False]
