from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from repr_det.detection import shapes
from repr_det.detection.shapes import CLASSES, OVERSAMPLING, ShapesSpec
from repr_det.errors import UserError

# pycocotools and numpy 2, in mask.decode
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SPEC = ShapesSpec(train=20, val=6)


@pytest.fixture(scope="module")
def scenes() -> list[shapes.Scene]:
    return [
        shapes.draw_scene(np.random.default_rng([7, k]), SPEC.size, SPEC.objects) for k in range(60)
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_shapes(folder, SPEC)
    return folder


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REPR_DET_CACHE", str(tmp_path))
    shapes.register_shapes(SPEC, prefix="test_shapes")
    yield tmp_path
    for name in [n for n in DatasetCatalog.list() if n.startswith("test_shapes_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_bytes_depend_on_the_seed_alone(written: Path, tmp_path: Path):
    for name in ("again", "other"):
        (tmp_path / name).mkdir()
    shapes.write_shapes(tmp_path / "again", SPEC)
    assert files_of(tmp_path / "again") == files_of(written)

    shapes.write_shapes(tmp_path / "other", ShapesSpec(seed=1, train=20, val=6))
    ours, others = files_of(written), files_of(tmp_path / "other")
    assert ours.keys() == others.keys()
    assert all(ours[name] != others[name] for name in ours)


def test_no_image_is_in_both_splits(written: Path):
    images = [p.read_bytes() for p in written.rglob("*.jpg")]
    assert len(images) == 26
    assert len(set(images)) == 26


def test_a_larger_dataset_begins_with_the_smaller_one(written: Path, tmp_path: Path):
    shapes.write_shapes(tmp_path, ShapesSpec(train=5, val=1))
    small, large = files_of(tmp_path), files_of(written)
    assert all(small[name] == large[name] for name in small if name.endswith(".jpg"))
    assert sum(name.endswith(".jpg") for name in small) == 6


def test_every_image_has_at_least_five_objects_of_varied_size(scenes: list[shapes.Scene]):
    counts = [len(scene.classes) for scene in scenes]
    assert min(counts) >= 5
    assert set(counts) == {5, 6, 7}
    areas = np.concatenate([scene.full.sum(axis=(1, 2)) for scene in scenes])
    # The radii alone, from 0.14 to 0.25 of the side, give a factor of 3.2 in area.
    assert np.percentile(areas, 95) / np.percentile(areas, 5) > (0.25 / 0.14) ** 2
    used = np.bincount(np.concatenate([scene.classes for scene in scenes]), minlength=len(CLASSES))
    assert used.min() > 0.5 * used.mean()


def test_about_a_third_of_the_objects_is_partly_hidden(scenes: list[shapes.Scene]):
    hidden = []
    for scene in scenes:
        assert not (scene.visible & ~scene.full).any()
        assert scene.visible.sum(axis=0).max() == 1  # no pixel belongs to two objects
        above = np.zeros_like(scene.full[0])
        for full, visible in zip(scene.full[::-1], scene.visible[::-1], strict=True):
            assert (visible == full & ~above).all()
            above |= full
            hidden.append(1 - visible.sum() / full.sum())
    assert max(hidden) <= 0.5
    assert 0.25 < np.mean(np.array(hidden) > 0.1) < 0.42


def test_colour_does_not_tell_the_class(scenes: list[shapes.Scene]):
    colours, labels = [], []
    for scene in scenes:
        for label, visible in zip(scene.classes, scene.visible, strict=True):
            small = cv2.resize(
                visible.astype(np.float32), (SPEC.size, SPEC.size), interpolation=cv2.INTER_AREA
            )
            colours.append(scene.image[small > 0.5].mean(axis=0))
            labels.append(label)
    colours, labels = np.array(colours), np.array(labels)
    spread = colours.std(axis=0)
    assert spread.min() > 40
    for label in range(len(CLASSES)):
        own = colours[labels == label]
        standard_error = spread / np.sqrt(len(own))
        assert (np.abs(own.mean(axis=0) - colours.mean(axis=0)) < 4 * standard_error).all()


def test_objects_stand_out_from_what_is_around_them(scenes: list[shapes.Scene]):
    """The contrast across an edge is far above the noise, for nearly every object."""
    contrasts = []
    for scene in scenes:
        for full, visible in zip(scene.full, scene.visible, strict=True):
            if (full != visible).any():
                continue
            inside = cv2.resize(
                full.astype(np.float32), (SPEC.size, SPEC.size), interpolation=cv2.INTER_AREA
            )
            kernel = np.ones((5, 5), np.uint8)
            rim = cv2.dilate(inside, kernel) - cv2.dilate(inside, np.ones((3, 3), np.uint8)) > 0.5
            edge = inside - cv2.erode(inside, kernel) > 0.5
            difference = scene.image[rim].mean(axis=0) - scene.image[edge].mean(axis=0)
            contrasts.append(np.linalg.norm(difference))
    assert len(contrasts) > 100
    assert np.percentile(contrasts, 5) > 40


def test_json_is_coco_and_describes_the_visible_parts(written: Path):
    coco = COCO(str(written / "train.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert sorted(coco.getCatIds()) == [1, 2, 3, 4, 5, 6]
    for number, image_id in enumerate(coco.getImgIds()):
        image = coco.loadImgs([image_id])[0]
        pixels = cv2.imread(str(written / "train" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        rng = np.random.default_rng([SPEC.seed, 0, number])
        scene = shapes.draw_scene(rng, SPEC.size, SPEC.objects)
        # JPEG keeps brightness well; it blurs the noise in colours
        grey, drawn = (cv2.cvtColor(p, cv2.COLOR_BGR2GRAY) for p in (pixels, scene.image))
        assert cv2.absdiff(grey, drawn).mean() < 2
        annotations = coco.loadAnns(coco.getAnnIds([image_id]))
        assert [a["category_id"] - 1 for a in annotations] == scene.classes.tolist()
        for annotation, visible in zip(annotations, scene.visible, strict=True):
            assert annotation["iscrowd"] == 0
            assert annotation["area"] == visible.sum() / OVERSAMPLING**2
            rows, columns = np.nonzero(visible.any(axis=1))[0], np.nonzero(visible.any(axis=0))[0]
            box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == [edge / OVERSAMPLING for edge in box]
            # pycocotools fills the polygons, at the resolution at which the object was drawn
            side = SPEC.size * OVERSAMPLING
            polygons = [[OVERSAMPLING * c for c in p] for p in annotation["segmentation"]]
            encoded = coco_mask.frPyObjects(polygons, side, side)
            filled = coco_mask.decode(coco_mask.merge(encoded)).astype(bool)
            assert (filled & visible).sum() / (filled | visible).sum() > 0.94


def test_the_hole_of_a_ring_is_outside_its_polygons():
    mask = np.zeros((400, 400), np.uint8)
    cv2.circle(mask, (200, 200), 150, 1, -1)
    cv2.circle(mask, (200, 200), 80, 0, -1)
    polygons = shapes._polygons(mask.astype(bool), np.array([0, 0]))
    polygons = [[OVERSAMPLING * c for c in p] for p in polygons]
    filled = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 400, 400)))
    assert filled[200, 200] == 0
    assert (filled & mask).sum() / (filled | mask).sum() > 0.98


def test_registration_writes_nothing_and_loading_writes_once(registered: Path):
    json_file = Path(MetadataCatalog.get("test_shapes_val").json_file)
    assert not any(registered.iterdir())
    assert json_file.is_relative_to(registered)

    records = DatasetCatalog.get("test_shapes_val")
    assert len(records) == 6
    assert len(DatasetCatalog.get("test_shapes_train")) == 20
    assert [p.name for p in registered.iterdir()] == [json_file.parent.name]  # nothing left aside
    assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(6))

    before = json_file.stat().st_mtime_ns
    DatasetCatalog.get("test_shapes_val")
    assert json_file.stat().st_mtime_ns == before


def test_registers_its_own_names():
    shapes.register_shapes()
    assert {"shapes_train", "shapes_val"} <= set(DatasetCatalog.list())
    assert MetadataCatalog.get("shapes_train").thing_classes == list(CLASSES)


def test_ground_truth_evaluates_to_full_ap(registered: Path):
    records = DatasetCatalog.get("test_shapes_val")
    evaluator = COCOEvaluator("test_shapes_val", tasks=("bbox",))
    evaluator.reset()
    for record in records:
        boxes = np.array([a["bbox"] for a in record["annotations"]])
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((SPEC.size, SPEC.size), pred_boxes=Boxes(boxes))
        found.scores = found.pred_boxes.area() * 0 + 0.9
        found.pred_classes = found.scores.new_tensor(
            [a["category_id"] for a in record["annotations"]]
        ).long()
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_an_interrupted_drawing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REPR_DET_CACHE", str(tmp_path))
    with monkeypatch.context() as patch:
        seen = []

        def imwrite(name: str, *rest: object) -> bool:
            seen.append(name)
            if len(seen) == 4:
                raise KeyboardInterrupt
            return True

        patch.setattr(cv2, "imwrite", imwrite)
        with pytest.raises(KeyboardInterrupt):
            shapes._drawn(shapes.shapes_folder(SPEC), SPEC)
    assert not any(tmp_path.iterdir())
    assert (shapes._drawn(shapes.shapes_folder(SPEC), SPEC) / "val.json").is_file()


def test_two_processes_may_draw_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REPR_DET_CACHE", str(tmp_path))
    spec = ShapesSpec(train=1, val=1)

    def write_while_another_finishes(folder: Path, spec: ShapesSpec) -> None:
        other = shapes.shapes_folder(spec)
        other.mkdir()
        (other / "first").touch()
        (folder / "second").touch()

    monkeypatch.setattr(shapes, "write_shapes", write_while_another_finishes)
    folder = shapes._drawn(shapes.shapes_folder(spec), spec)
    assert [p.name for p in folder.iterdir()] == ["first"]
    assert [p for p in tmp_path.iterdir()] == [folder]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REPR_DET_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to \(.*Set REPR_DET_CACHE to a folder"):
        shapes._drawn(shapes.shapes_folder(SPEC), SPEC)
    monkeypatch.setenv("REPR_DET_CACHE", str(tmp_path / "folder"))
    monkeypatch.setattr(cv2, "imwrite", lambda *_: False)
    with pytest.raises(UserError, match="cannot be written to .*is the disk full"):
        shapes._drawn(shapes.shapes_folder(SPEC), SPEC)


def test_a_disk_that_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cv2, "imwrite", lambda *_: False)
    with pytest.raises(OSError, match=r"Cannot write .*000000\.jpg"):
        shapes.write_shapes(tmp_path, SPEC)


def test_objects_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="200 objects do not fit into an image of 32 pixels"):
        shapes.draw_scene(np.random.default_rng(0), 32, (200, 200))
