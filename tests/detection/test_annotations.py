"""What is asked of an annotation file, and what is repaired."""

from __future__ import annotations

import copy
import json
import logging
import math

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from pycocotools import mask as coco_mask

from repr_det.detection.annotations import (
    KEYPOINTS,
    MASKS,
    category_names,
    check,
    read_coco,
    read_labels,
)
from repr_det.detection.datasets import records_of
from repr_det.detection.masks import decoded_counts, rle_fault
from repr_det.errors import UserError
from tests.coco_damage import SIZES, rle, sound
from tests.coco_files import make_truth
from tests.detectors import needs_coco


@pytest.fixture
def write(tmp_path):
    """Writes a sound file with a change made to it."""

    def write(change, name="val.json"):
        content = sound()
        change(content)
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return write


def first(content):
    return content["annotations"][0]


def refused(write, change):
    with pytest.raises(UserError) as error:
        read_coco(write(change))
    return str(error.value)


def refused_for(use, write, change):
    """The sentence for one use; without it the file is fine."""
    file = read_coco(write(change))
    file.require(["boxes"])
    with pytest.raises(UserError) as error:
        file.require([use])
    return str(error.value)


def test_a_sound_file_stays_as_it_is(tmp_path):
    path = tmp_path / "val.json"
    path.write_text(json.dumps(sound()))
    file = read_coco(path)
    wanted = {k: v for k, v in sound().items() if k != "info"}
    assert file.content == wanted and not file.faults and not file.damaged


def test_the_content_that_is_checked_is_not_changed():
    content = sound()
    first(content).update(iscrowd=None, area="600", segmentation=[[]], keypoints=3)
    before = copy.deepcopy(content)
    check(content, "val.json")
    assert content == before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read(tmp_path, encoding):
    path = tmp_path / "val.json"
    path.write_text(json.dumps(sound(), ensure_ascii=False), encoding=encoding)
    assert category_names(read_coco(path).content) == ["bolt", "nut", "été"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSONDecodeError"),
        ("not json", "JSONDecodeError"),
        ('{"categories": ["\xe9"]}', "UnicodeDecodeError"),
        ("[" * 100_000, "RecursionError"),
        (f"[{'9' * 5000}]", "ValueError"),
    ],
)
def test_what_is_not_json_is_named(tmp_path, text, reason):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=rf"bad\.json is not JSON \({reason}: "):
        read_coco(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no.json does not exist\. Set the path"):
        read_coco(tmp_path / "no.json")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)\. Set the path"):
        read_coco(tmp_path)


@pytest.mark.parametrize(
    ("value", "crowd"),
    [
        *((value, 0) for value in (None, False, 0, 0.0, "0")),
        *((value, 1) for value in (True, 1, 1.0, "1")),
    ],
)
def test_ways_to_write_iscrowd(write, value, crowd):
    file = read_coco(write(lambda c: first(c).update(iscrowd=value)))
    found = file.content["annotations"][0]["iscrowd"]
    assert type(found) is int and found == crowd


def test_a_missing_iscrowd_is_0(write):
    file = read_coco(write(lambda c: [entry.pop("iscrowd") for entry in c["annotations"]]))
    assert [entry["iscrowd"] for entry in file.content["annotations"]] == [0] * 10


@pytest.mark.parametrize("value", ["no", "", "true", 2, -1, 0.5, math.nan, [], [0], {}])
def test_any_other_iscrowd_is_refused(write, value):
    sentence = refused(write, lambda c: first(c).update(iscrowd=value))
    assert "val.json: annotation 100 has the iscrowd " in sentence and "Set 0 or 1" in sentence


@pytest.mark.parametrize("value", [None, "576.0", math.nan, math.inf, -3, True, [4], ...])
@pytest.mark.parametrize("number", [0, 4, 7])
def test_an_area_that_is_none_is_computed(write, number, value):
    def change(content):
        content["annotations"][number]["area"] = value
        if value is ...:
            del content["annotations"][number]["area"]

    wanted = sound()["annotations"][number]
    by_mask = 10 if number == 7 else wanted["bbox"][2] * wanted["bbox"][3]  # drawn as rectangles
    assert read_coco(write(change)).content["annotations"][number]["area"] == by_mask
    if number == 0:

        def without_mask(content):
            change(content)
            first(content).update(segmentation=[[1, 2]], bbox=[1, 2, 3.5, 4])

        assert read_coco(write(without_mask)).content["annotations"][0]["area"] == 14


def test_all_crowds_are_refused_with_their_count(write):
    sentence = refused(write, lambda c: [e.update(iscrowd=1) for e in c["annotations"]])
    assert "val.json: all 10 annotations are crowds (iscrowd 1)" in sentence


@pytest.mark.parametrize(
    "mask",
    [
        [1, 2, 30, 2, 30, 40],
        [[1, 2], [30, 2], [30, 40]],
        [[1, 2, 30, 40]],
        [[1, 2, 30, 2, 30, 40, 5]],
        [[]],
        [[1, 2, 30, 2, 30, 40], [1, 2]],
        [[1, 2, 30, 2, 30, "40"]],
        [[1, 2, 30, 2, 30, None]],
        [[1, 2, 30, 2, 30, math.nan]],
        [[1, 2, 30, 2, 30, 1e9]],
        [[1, 2, 30, 2, 30, True]],
        ["1 2 30 2 30 40"],
        "1 2 30 2 30 40",
        "",
        {},
        7,
        {"size": [61, 80], "counts": [61 * 80]},
        {"size": [80, 60], "counts": [60 * 80]},
        {"size": [60, 80], "counts": [60 * 80 - 1]},
        {"size": [60, 80], "counts": [60 * 80 + 1, -1]},
        {"size": [60, 80], "counts": [60.0 * 80]},
        {"size": [60, 80], "counts": "hello"},
        {"size": [60, 80], "counts": ""},
        {"size": [60, 80], "counts": rle([5, 5, 20, 20], 60, 80)["counts"][:-1]},
        {"size": [60, 80], "counts": rle([5, 5, 20, 20], 60, 80)["counts"] + "1"},
        {"size": [60, 80], "counts": rle([5, 5, 20, 20], 60, 80)["counts"] + "P"},
        {"size": [60, 80], "counts": "\u00e9\u00e9"},
        {"size": [60, 80]},
        {"counts": [60 * 80]},
    ],
    ids=lambda mask: json.dumps(mask)[:40],
)
def test_a_damaged_mask_is_named_and_its_box_is_kept(write, mask):
    sentence = refused_for(MASKS, write, lambda c: first(c).update(segmentation=mask))
    assert "val.json: annotation 100 has " in sentence and "Set " in sentence
    entry = read_coco(write(lambda c: first(c).update(segmentation=mask))).content["annotations"][0]
    assert entry == {k: v for k, v in first(sound()).items() if k != "segmentation"}


@pytest.mark.parametrize("mask", [None, [], ...])
def test_an_object_without_a_mask_is_named(write, mask):
    def change(content):
        content["annotations"][3]["segmentation"] = mask
        if mask is ...:
            del content["annotations"][3]["segmentation"]

    assert "annotation 103 has no mask" in refused_for(MASKS, write, change)
    assert not read_coco(write(change)).damaged


def test_how_many_masks_are_damaged(write):
    change = lambda c: [e.update(segmentation=[[]]) for e in c["annotations"]]  # noqa: E731
    assert "10 annotations need it." in refused_for(MASKS, write, change)


def remove(part, index, key):
    return lambda content: content[part][index].pop(key)


def update(part, index, **values):
    return lambda content: content[part][index].update(values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["images"].clear(), "holds no images"),
        (lambda c: c["annotations"].clear(), "holds no annotations"),
        (lambda c: c["categories"].clear(), "holds no categories"),
        (lambda c: c.pop("categories"), "its categories are null"),
        (lambda c: c.update(images={"id": 1}), 'its images are {"id": 1}'),
        (lambda c: c["annotations"].insert(2, 7), "annotations[2] is 7"),
        (lambda c: c["images"].append(None), "images[3] is null"),
        (remove("images", 1, "id"), "images[1] has no id"),
        (remove("annotations", 1, "id"), "annotations[1] has no id"),
        (remove("categories", 2, "id"), "categories[2] has no id"),
        (update("categories", 2, id="7"), 'categories[2] has the id "7", but categories[0] has 3'),
        (update("categories", 2, id=True), "categories[2] has the id true"),
        (update("annotations", 2, id=1.5), "annotations[2] has the id 1.5"),
        (update("annotations", 2, id=10**30), "annotations[2] has the id 1000000"),
        (update("annotations", 2, id=100), "2 annotations have the id 100"),
        (update("images", 2, id=4), "2 images have the id 4"),
        (update("categories", 2, id=3), "2 categories have the id 3"),
        (remove("images", 1, "file_name"), "image 2 has no file_name"),
        (update("images", 1, file_name=None), "image 2 has the file_name null"),
        (remove("images", 1, "width"), "image 2 has no width"),
        (remove("images", 1, "height"), "image 2 has no height"),
        *(
            (update("images", 1, height=side), "image 2 has the height ")
            for side in (None, 0, "40", 1e30, math.nan, True, -64, 64.5)
        ),
        (update("images", 1, height=10**6, width=10**6), "image 2 has the width 1000000 and"),
        (remove("annotations", 1, "image_id"), "annotation 101 has no image_id"),
        (update("annotations", 1, image_id=5), "annotation 101 has image_id 5, which the file"),
        (update("annotations", 1, image_id="2"), 'annotation 101 has image_id "2", which'),
        (update("annotations", 1, image_id=[2]), "annotation 101 has image_id [2], which"),
        (remove("annotations", 1, "category_id"), "annotation 101 has no category_id"),
        (update("annotations", 1, category_id="1"), 'annotation 101 has category_id "1", which'),
        (update("annotations", 1, category_id=True), "annotation 101 has category_id true, which"),
        (remove("annotations", 1, "bbox"), "annotation 101 has no bbox"),
        *(
            (update("annotations", 1, bbox=box), "annotation 101 has the bbox ")
            for box in (
                None,
                [],
                [1, 2, 3],
                "1 2 3 4",
                ["1", "2", "3", "4"],
                [1, 2, None, 4],
                [1, 2, math.nan, 4],
                [1, 2, 1e30, 4],
                [1, 2, -3, 4],
                [1, 2, 3, -0.5],
                [1, 2, True, 4],
            )
        ),
        (update("annotations", 1, ignore=1), "annotation 101 has the key ignore"),
        (update("categories", 2, name="nut"), 'categories 3 and 7 are both called "nut"'),
        (update("categories", 2, name=7), "category 7 has the name 7. Set a text."),
        (update("categories", 2, name=None), "category 7 has the name null"),
        (update("categories", 2, name=" "), 'category 7 has the name " "'),
        (update("categories", 2, name="\ud800"), "category 7 has the name"),
        (remove("categories", 2, "name"), "category 7 has no name"),
    ],
)
def test_contradictions(write, change, sentence):
    found = refused(write, change)
    assert sentence in found and "val.json" in found and "\n" not in found


def test_whole_numbers_written_as_floats_are_read(write):
    def change(content):
        for part in ("images", "annotations", "categories"):
            for entry in content[part]:
                for key in ("id", "image_id", "category_id", "width", "height"):
                    if key in entry:
                        entry[key] = float(entry[key])

    found = read_coco(write(change)).content
    assert json.dumps(found) == json.dumps({k: v for k, v in sound().items() if k != "info"})


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda c: None, '1 of 3 categories have no annotations, for example "été" (id 7)'),
        (update("annotations", 0, segmentation=[[1, 2]]), "annotation 100 has the polygon [1, 2]"),
        (update("images", 0, neg_category_ids=[1]), "is a file of LVIS"),
    ],
)
def test_hints(write, caplog, change, hint):
    with caplog.at_level(logging.INFO, "detectron2"):
        read_coco(write(change))
    assert hint in caplog.text


def test_names_and_images_are_read_from_a_file_without_annotations(write):
    """As the files of COCO's test sets."""
    path = write(lambda c: c.pop("annotations"))
    found = read_labels(path)
    assert [image["id"] for image in found["images"]] == [i["id"] for i in sound()["images"]]
    with pytest.raises(UserError, match="its annotations are null"):
        read_coco(path)


def test_the_image_of_lvis_is_known_by_its_url(write):
    def change(content):
        for image in content["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"

    images = read_coco(write(change)).content["images"]
    assert [image["file_name"] for image in images] == [f"val2017/{i}.png" for i in SIZES]


POINTS = {"keypoints": ["left", "right"], "skeleton": [[1, 2]]}


def with_keypoints(content):
    for category in content["categories"]:
        category.update(POINTS)
    for entry in content["annotations"]:
        entry["keypoints"] = [1, 2, 2, 3, 4, 1]


def test_keypoints_are_counted_and_missing_ones_are_not_labelled(write):
    def change(content):
        with_keypoints(content)
        del content["annotations"][1]["keypoints"]

    file = read_coco(write(change))
    file.require([KEYPOINTS])
    entries = file.content["annotations"]
    assert [entry["num_keypoints"] for entry in entries] == [2, 0, *[2] * 8]
    assert entries[1]["keypoints"] == [0] * 6


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (update("annotations", 1, keypoints=[1, 2, 2]), "annotation 101 has the keypoints [1, 2, "),
        (update("annotations", 1, keypoints=[1, 2, 3, 4, 5, 6]), "Set visibilities of 0, 1 or 2"),
        (update("annotations", 1, keypoints=["1"] * 6), "annotation 101 has the keypoints"),
        (update("annotations", 1, keypoints="none"), "annotation 101 has the keypoints"),
        (update("categories", 1, keypoints=["left"], skeleton=[]), "has other keypoints than cat"),
        (update("categories", 0, keypoints=["left", "left"]), "Set different names"),
        (update("categories", 0, keypoints=3), "category 3 has the keypoints 3"),
        (update("categories", 0, skeleton=[[0, 1]]), "Set pairs of numbers from 1 to 2"),
        (update("categories", 0, skeleton="1-2"), "category 3 has the skeleton"),
    ],
)
def test_damaged_keypoints_are_named_and_boxes_are_kept(write, change, sentence):
    def both(content):
        with_keypoints(content)
        change(content)

    assert sentence in refused_for(KEYPOINTS, write, both)


def test_records_are_those_of_detectron2(tmp_path):
    """On sound files: here RLE of both kinds, crowds, images without objects, keypoints."""
    for number, content in enumerate([sound(), make_truth()]):
        if not number:
            with_keypoints(content)
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        found = records_of(read_coco(path).content, "images")
        wanted = load_coco_json(str(path), "images", f"records_{number}_{tmp_path.name}")
        assert len(found) == len(wanted) and found == wanted


@needs_coco
def test_records_of_coco_are_those_of_detectron2():
    from repr_det.engine.data import datasets_root

    path = datasets_root() / "coco" / "annotations" / "instances_val2017.json"
    found = records_of(read_coco(path).content, "images")
    assert found == load_coco_json(str(path), "images", "records_of_coco")


def test_counts_of_rle_are_those_of_pycocotools():
    """By decoding masks of random pixels, of few and many runs."""
    rng = np.random.default_rng(0)
    for share in (0, 0.001, 0.02, 0.5, 1):
        pixels = np.asfortranarray(rng.random((70, 90)) < share, dtype=np.uint8)
        encoded = coco_mask.encode(pixels)
        text = encoded["counts"].decode()
        counts = decoded_counts(text)
        values = np.arange(len(counts)) % 2
        assert np.array_equal(np.repeat(values, counts), pixels.ravel(order="F"))
        assert rle_fault({"size": [70, 90], "counts": text}, 70, 90) is None
        for cut in range(len(text) - 1, max(0, len(text) - 8), -1):
            assert rle_fault({"size": [70, 90], "counts": text[:cut]}, 70, 90)
