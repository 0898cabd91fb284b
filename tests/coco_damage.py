"""Sound COCO files, ways to damage them, and what a damaged file means if it means anything."""

from __future__ import annotations

import copy
import math

import numpy as np
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

SIZES = {4: (60, 80), 2: (64, 96), 9: (50, 50)}
"""Height and width by image id."""

NAMES = {3: "nut", 1: "bolt", 7: "été"}

WRONG = [
    None,
    True,
    False,
    "",
    "1",
    "text",
    [],
    {},
    [[]],
    [1, 2, 3],
    ["a"] * 6,
    [[1, 2, 3, 4]],
    [[1, 2, 3, 4, 5]],
    [[1, 2], [30, 2], [30, 40]],
    [1, 2, 30, 2, 30, 40],
    {"size": [60, 80], "counts": "abc"},
    {"size": [60, 80], "counts": [10, 20]},
    {"size": [1, 1], "counts": [1]},
    {"size": [60, 80], "counts": None},
    0,
    1,
    -1,
    1.0,
    0.5,
    1e30,
    -1e300,
    10**30,
    math.nan,
    math.inf,
    "\ud800",
    "a\\b.png",
    "http://images.org/1.png",
]
"""Values where others belong."""

OPERATIONS = ("set", "set inside", "remove", "duplicate", "swap", "add", "negate", "as text")


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def rle(box, height, width):
    found = coco_mask.frPyObjects(rectangle(*box), height, width)[0]
    return {"size": found["size"], "counts": found["counts"].decode()}


def sound():
    """Three images, three categories, ten objects: polygons, RLE of both kinds, a crowd."""
    rng, annotations = np.random.default_rng(0), []
    for number in range(10):
        image = (4, 2, 9)[number % 3]
        height, width = SIZES[image]
        box = [float(v) for v in (*rng.integers(0, 20, 2), *rng.integers(8, 28, 2))]
        segmentation = rectangle(*box)
        if number == 4:
            segmentation = rle(box, height, width)
        if number == 7:  # a crowd of a row of pixels in each column
            segmentation = {"size": [height, width], "counts": [5, 1] + [height - 1, 1] * 9}
            segmentation["counts"].append(height * width - sum(segmentation["counts"]))
        annotations.append(
            {
                "id": 100 + number,
                "image_id": image,
                "category_id": (3, 1)[number % 2],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(number == 7),
                "segmentation": segmentation,
            }
        )
    return {
        "info": {"description": "made up"},
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": h, "width": w}
            for i, (h, w) in SIZES.items()
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in NAMES.items()],
    }


def sound_results(content):
    """Moved boxes of the objects, with masks, and some that are none."""
    rng, results = np.random.default_rng(1), []
    for entry in [*content["annotations"], *content["annotations"][::3]]:
        height, width = SIZES[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        dx, dy = rng.integers(-2, 3, 2)
        box = [float(v) for v in (max(0, x + dx), max(0, y + dy), w, h)]
        results.append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": box,
                "score": round(float(rng.uniform()), 6),
                "segmentation": rle(box, height, width),
            }
        )
    return results


@st.composite
def damages(draw):
    """Where in a file, and what is done there."""
    operation = draw(st.sampled_from(OPERATIONS))
    part = draw(st.sampled_from(["annotations"] * 4 + ["images", "categories", "whole"]))
    return (
        operation,
        part,
        draw(st.integers(0, 9)),
        draw(st.integers(0, 7)),
        draw(st.sampled_from(WRONG)),
    )


def damaged(content, damage):
    """A copy with one damage more; a place that is not there any more is left alone."""
    content = copy.deepcopy(content)
    operation, part, index, key, value = damage
    where, at = content, ("images", "annotations", "categories", "info")[key % 4]
    if part != "whole":
        entries = content.get(part)
        if type(entries) is not list or not entries:
            return content
        index %= len(entries)
        if operation == "duplicate":
            entries.append(copy.deepcopy(entries[index]))
            return content
        if operation == "swap":
            entries[0], entries[index] = entries[index], entries[0]
            return content
        where = entries[index]
        if type(where) is not dict or not where:
            entries[index] = value
            return content
        at = list(where)[key % len(where)]
    if operation == "set":
        where[at] = value
    elif operation == "remove":
        where.pop(at, None)
    elif operation == "add":
        where[("ignore", "caption", "extra", "keypoints", "score")[key % 5]] = value
    elif operation == "set inside" and type(where.get(at)) is list and where[at]:
        where[at][key % len(where[at])] = value
    elif operation == "negate" and type(where.get(at)) in (int, float):
        where[at] = -where[at]
    elif operation == "as text" and at in where:
        where[at] = str(where[at])
    return content


def meant(content):
    """What a file that is accepted means, repaired by hand; masks that are damaged are left out."""
    content = copy.deepcopy({k: content[k] for k in ("images", "annotations", "categories")})
    sizes = {
        image["id"]: (int(image["height"]), int(image["width"])) for image in content["images"]
    }
    for number, entry in enumerate(content["annotations"], 1):
        entry["id"] = number
        entry["iscrowd"] = int(entry.get("iscrowd") in (1, "1"))
        entry.pop("ignore", None)
        size = sizes[entry["image_id"]]
        if not is_sound_mask(entry.get("segmentation"), size):
            entry.pop("segmentation", None)
        area = entry.get("area")
        if isinstance(area, bool) or not isinstance(area, (int, float)) or not 0 <= area <= 1e12:
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]
            if "segmentation" in entry:
                mask = entry["segmentation"]
                if isinstance(mask, list):
                    mask = coco_mask.merge(coco_mask.frPyObjects(mask, *size))
                elif isinstance(mask["counts"], list):
                    mask = coco_mask.frPyObjects(mask, *size)
                entry["area"] = float(coco_mask.area(mask))
    return content


def is_sound_mask(mask, size):
    """By decoding: numpy for polygons, and for RLE only the two texts and lists that are sound."""
    if isinstance(mask, list) and mask:
        try:
            rows = [np.array(polygon, dtype=float) for polygon in mask]
        except (TypeError, ValueError):
            return False
        return all(
            row.ndim == 1
            and len(row) >= 6
            and len(row) % 2 == 0
            and not any(isinstance(value, (bool, str)) for value in polygon)
            and bool((np.abs(row) <= 10 * max(size)).all())
            for row, polygon in zip(rows, mask, strict=True)
        )
    known = [e["segmentation"] for e in sound()["annotations"] if type(e["segmentation"]) is dict]
    return isinstance(mask, dict) and any(
        mask.get("counts") == k["counts"] and mask.get("size") == k["size"] == list(size)
        for k in known
    )
