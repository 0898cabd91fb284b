"""COCO's annotation files: one reader and one check for everything that uses them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools import mask as coco_mask

from repr_det.detection.masks import FURTHEST, NO_MASK, are_pixels, mask_fault
from repr_det.errors import UserError, shown

logger = logging.getLogger(f"detectron2.{__name__}")

BOXES, MASKS, KEYPOINTS = "boxes", "masks", "keypoints"
"""What a file is used for. Every use needs boxes."""

MOST_PIXELS = 2**31
"""An image has fewer: pycocotools counts the pixels of a mask in 32 bits."""

_CROWD = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1}
"""How ``iscrowd`` is written. A key stands for its equals: 0 also for 0.0 and False."""


class CocoFile(NamedTuple):
    """A file that was checked, and repaired where nothing had to be guessed.

    Attributes:
        path: of the file.
        content: ``images``, ``annotations`` and ``categories``. Every annotation has a sound
            ``bbox``, ``iscrowd`` 0 or 1, and ``area``; ``segmentation`` where it is a sound mask,
            and ``keypoints`` with ``num_keypoints`` where they are sound.
        faults: by use, the sentence that says why the file cannot be used for it.
        damaged: uses for which something is there but wrong, rather than missing.
    """

    path: str
    content: dict[str, list[dict[str, Any]]]
    faults: dict[str, str]
    damaged: frozenset[str]

    def require(self, uses: Collection[str]) -> None:
        """Refuse the file where it cannot be used for something.

        Args:
            uses: of :data:`BOXES`, :data:`MASKS` and :data:`KEYPOINTS`.

        Raises:
            UserError: an annotation lacks what a use needs.
        """
        for use in uses:
            if use in self.faults:
                raise UserError(self.faults[use])


def read_json(path: str | Path, kind: str) -> Any:
    """The content of a JSON file, with or without a byte order mark.

    Args:
        path: of the file.
        kind: what the file should be, to be named.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{kind} {path} does not exist. Set the path of a JSON file.") from None
    except OSError as error:
        raise UserError(
            f"{kind} {path} cannot be read ({error.strerror}). Set the path of a JSON file."
        ) from None
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise UserError(
            f"{kind} {path} is not JSON ({type(error).__name__}: {error}). Set another file."
        ) from None


def read_coco(path: str | Path) -> CocoFile:
    """Read and check an annotation file; see :func:`check`.

    Raises:
        UserError: no such file, or one that :func:`check` refuses.
    """
    return check(read_json(path, "Annotation file"), str(path))


def read_labels(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """``images`` and ``categories`` of a file, checked; its annotations are not looked at.

    Raises:
        UserError: no such file, or entries that :func:`check` refuses.
    """
    path = str(path)
    parts = _parts(read_json(path, "Annotation file"), path, ("images", "categories"))
    return {
        "images": _images(path, parts["images"]),
        "categories": _categories(path, parts["categories"]),
    }


def category_names(content: dict[str, Any]) -> list[str]:
    """Names of the categories of COCO's JSON, by ascending id."""
    return [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]


def check(content: Any, path: str) -> CocoFile:
    """Refuse content that nothing can be done with, and repair what has one meaning only.

    ``iscrowd`` that is missing or null is 0. ``area`` that is missing or no number is that of the
    mask, or else of the box. Ids such as 1.0 are whole numbers.

    Args:
        content: of the JSON. It stays as it is.
        path: of the file, to be named.

    Raises:
        UserError: it is not COCO's format, or its entries contradict one another.
    """
    parts = _parts(content, path)
    for part in ("images", "annotations", "categories"):
        if not parts[part]:
            raise UserError(f"{path} holds no {part}. Set a file that does.")
    images = _images(path, parts["images"])
    categories = _categories(path, parts["categories"])
    annotations = _linked(path, parts["annotations"], images, categories)
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    faults = _Faults(path)
    points = _keypoints_of_an_object(path, categories, annotations, faults)
    for entry in annotations:
        _repair_object(path, entry)
        size = sizes[entry["image_id"]]
        if fault := mask_fault(entry.get("segmentation"), *size):
            faults.add(MASKS, entry, fault, missing=fault == NO_MASK)
            entry.pop("segmentation", None)
        if fault := _repair_keypoints(entry, points):
            faults.add(KEYPOINTS, entry, fault)
        if not are_pixels([entry.get("area")], FURTHEST**2) or entry["area"] < 0:
            entry["area"] = _area(entry, size)
    crowds = sum(entry["iscrowd"] for entry in annotations)
    if crowds == len(annotations):
        raise UserError(
            f"{path}: all {crowds} annotations are crowds (iscrowd 1), which are neither trained "
            f"on nor evaluated. Set iscrowd 0 for single objects."
        )
    checked = {"images": images, "annotations": annotations, "categories": categories}
    sentences = faults.sentences()
    _hint(path, checked)
    for use in faults.damaged:
        logger.warning(f"{sentences[use]} The file can be used for boxes.")
    return CocoFile(path, checked, sentences, frozenset(faults.damaged))


class _Faults:
    """The first fault by use, and how many there are."""

    def __init__(self, path: str) -> None:
        self._path, self._counts = path, Counter()
        self._first: dict[str, str] = {}
        self.damaged: set[str] = set()

    def add(self, use: str, entry: dict[str, Any], fault: str, *, missing: bool = False) -> None:
        """Note that an annotation cannot be used; one that is damaged comes before missing ones."""
        self._counts[use] += 1
        if use not in self._first or not missing and use not in self.damaged:
            self._first[use] = f"{self._path}: annotation {shown(entry['id'])} {fault}"
        if not missing:
            self.damaged.add(use)

    def add_file(self, use: str, sentence: str) -> None:
        """Note that the whole file cannot be used."""
        self._first[use] = sentence
        self.damaged.add(use)

    def sentences(self) -> dict[str, str]:
        """What is wrong, by use."""
        return {
            use: f"{first} {self._counts[use]} annotations need it."
            if self._counts[use] > 1
            else first
            for use, first in self._first.items()
        }


def _parts(
    content: Any, path: str, names: Sequence[str] = ("images", "annotations", "categories")
) -> dict[str, list[dict[str, Any]]]:
    """Lists of a file, their entries dicts."""
    if type(content) is not dict:
        raise UserError(
            f"{path} is not a COCO annotation file: it is {shown(content)}. Set a file with "
            f"images, annotations and categories."
        )
    parts = {}
    for part in names:
        if type(content.get(part)) is not list:
            raise UserError(
                f"{path} is not a COCO annotation file: its {part} are {shown(content.get(part))}. "
                f"Set a file with images, annotations and categories."
            )
        parts[part] = content[part]
        for index, entry in enumerate(parts[part]):
            if type(entry) is not dict:
                raise UserError(
                    f"{path}: {part}[{index}] is {shown(entry)}. Set an entry of COCO's format."
                )
    return parts


def _whole(value: Any) -> Any:
    """An integer that is written as a float, as an integer; everything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def _with_ids(path: str, part: str, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of entries, whose ids are unique and of one type."""
    found = []
    for index, entry in enumerate(entries):
        if "id" not in entry:
            raise UserError(f"{path}: {part}[{index}] has no id. Set one.")
        number = _whole(entry["id"])
        if type(number) not in (int, str) or (
            type(number) is int and not -(2**63) <= number < 2**63
        ):
            raise UserError(
                f"{path}: {part}[{index}] has the id {shown(number)}. Set a whole number."
            )
        if found and type(number) is not type(found[0]["id"]):
            raise UserError(
                f"{path}: {part}[{index}] has the id {shown(number)}, but {part}[0] has "
                f"{shown(found[0]['id'])}. Set numbers everywhere."
            )
        found.append({**entry, "id": number})
    numbers = Counter(entry["id"] for entry in found)
    if len(numbers) < len(found):
        number, times = numbers.most_common(1)[0]
        raise UserError(
            f"{path}: {times} {part} have the id {shown(number)}. Set a different id for each."
        )
    return found


def _is_text(value: Any) -> bool:
    """Whether it is text that can be printed: no half of a surrogate pair, not blank."""
    return (
        type(value) is str
        and bool(value.strip())
        and value.encode(errors="ignore").decode() == value
    )


def _images(path: str, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    images = _with_ids(path, "images", entries)
    for image in images:
        whose = f"{path}: image {shown(image['id'])}"
        if "file_name" not in image and _is_text(image.get("coco_url")):  # LVIS
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
        if not _is_text(image.get("file_name")):
            raise UserError(f"{_lacks(whose, image, 'file_name')}. Set the image's file name.")
        for side in ("width", "height"):
            length = _whole(image.get(side))
            if type(length) is not int or not 0 < length < MOST_PIXELS:
                raise UserError(f"{_lacks(whose, image, side)}. Set the image's size in pixels.")
            image[side] = length
        if image["width"] * image["height"] >= MOST_PIXELS:
            raise UserError(
                f"{whose} has the width {image['width']} and height {image['height']}. Set the "
                f"image's size in pixels."
            )
    return images


def _lacks(whose: str, entry: dict[str, Any], key: str) -> str:
    return f"{whose} has {f'the {key} {shown(entry[key])}' if key in entry else f'no {key}'}"


def _categories(path: str, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    categories = _with_ids(path, "categories", entries)
    by_name: dict[str, Any] = {}
    for category in categories:
        if not _is_text(category.get("name")):
            whose = f"{path}: category {shown(category['id'])}"
            raise UserError(f"{_lacks(whose, category, 'name')}. Set a text.")
        other = by_name.setdefault(category["name"], category["id"])
        if other != category["id"]:
            raise UserError(
                f"{path}: categories {shown(other)} and {shown(category['id'])} are both called "
                f"{shown(category['name'])}. Remove one, or set another name."
            )
    return categories


def _linked(
    path: str,
    entries: Sequence[dict[str, Any]],
    images: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Copies of annotations whose images and categories exist."""
    annotations = _with_ids(path, "annotations", entries)
    links = [
        ("image_id", {image["id"] for image in images}),
        ("category_id", {category["id"] for category in categories}),
    ]
    for entry in annotations:
        for key, known in links:
            number = _whole(entry.get(key))
            if type(number) not in (int, str) or number not in known:
                whose = f"{path}: annotation {shown(entry['id'])}"
                if key not in entry:
                    raise UserError(f"{whose} has no {key}. Set one.")
                raise UserError(
                    f"{whose} has {key} {shown(number)}, which the file does not define. Correct "
                    f"or remove it."
                )
            entry[key] = number
    return annotations


def _repair_object(path: str, entry: dict[str, Any]) -> None:
    """Refuse an annotation without a sound box, or repair ``iscrowd`` in place."""
    whose, box = f"{path}: annotation {shown(entry['id'])}", entry.get("bbox")
    if type(box) is not list or len(box) != 4 or not are_pixels(box) or min(box[2:]) < 0:
        raise UserError(
            f"{_lacks(whose, entry, 'bbox')}. Set four numbers in pixels: x, y, width, height."
        )
    crowd = entry.get("iscrowd")
    try:
        entry["iscrowd"] = _CROWD[crowd]
    except (KeyError, TypeError):
        raise UserError(f"{whose} has the iscrowd {shown(crowd)}. Set 0 or 1.") from None
    if entry.get("ignore"):
        raise UserError(
            f"{whose} has the key ignore, which COCO's format does not know. Set iscrowd 1, or "
            f"remove it."
        )


def _area(entry: dict[str, Any], size: tuple[int, int]) -> float:
    """Of the mask, where there is a sound one, else of the box."""
    if "segmentation" in entry:
        return float(coco_mask.area(as_rle(entry["segmentation"], *size)))
    return entry["bbox"][2] * entry["bbox"][3]


def as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A sound mask as compressed RLE, as pycocotools makes it."""
    if type(segmentation) is list:
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if type(segmentation["counts"]) is list:
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def _keypoints_of_an_object(
    path: str,
    categories: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]],
    faults: _Faults,
) -> int:
    """How many keypoints an object has; 0 where the file has none, or none that can be used."""
    first: dict[str, Any] | None = None
    for category in categories:
        names, whose = category.get("keypoints"), f"{path}: category {shown(category['id'])}"
        if not names:
            continue
        if type(names) is not list or not all(map(_is_text, names)) or len(set(names)) < len(names):
            faults.add_file(
                KEYPOINTS, f"{whose} has the keypoints {shown(names)}. Set different names."
            )
            return 0
        if not _are_bones(category.get("skeleton") or [], len(names)):
            faults.add_file(
                KEYPOINTS,
                f"{whose} has the skeleton {shown(category['skeleton'])}. Set pairs of numbers "
                f"from 1 to {len(names)}.",
            )
            return 0
        first = first or category
        if names != first["keypoints"]:
            other = shown(first["id"])
            faults.add_file(
                KEYPOINTS, f"{whose} has other keypoints than category {other}. Set the same."
            )
            return 0
    if first is not None:
        return len(first["keypoints"])
    # Names may be in the metadata of a registered dataset.
    found = (entry.get("keypoints") for entry in annotations)
    return next((len(points) // 3 for points in found if points and type(points) is list), 0)


def _are_bones(skeleton: Any, count: int) -> bool:
    """Whether a skeleton is pairs of keypoints, counted from 1."""
    return type(skeleton) is list and all(
        type(bone) is list
        and len(bone) == 2
        and all(type(end) is int and 1 <= end <= count for end in bone)
        for bone in skeleton
    )


def _repair_keypoints(entry: dict[str, Any], count: int) -> str | None:
    """What is wrong with an object's keypoints, if anything; missing ones are not labelled."""
    points = entry.pop("keypoints", None) or [0] * (3 * count)
    if not count:
        return None
    if type(points) is not list or len(points) != 3 * count or not are_pixels(points):
        return f"has the keypoints {shown(points)}. Set x, y and visibility of {count} points."
    if not set(points[2::3]) <= {0, 1, 2}:
        return f"has the keypoints {shown(points)}. Set visibilities of 0, 1 or 2."
    entry["keypoints"] = points
    if type(entry.get("num_keypoints")) is not int or entry["num_keypoints"] < 0:
        entry["num_keypoints"] = sum(map(bool, points[2::3]))
    return None


def _hint(path: str, content: dict[str, Any]) -> None:
    """Warn of what is legal and probably not meant."""
    images = {image["id"]: image for image in content["images"]}
    annotations, categories = content["annotations"], content["categories"]
    useless = []
    for entry in annotations:
        image, (x, y, width, height) = images[entry["image_id"]], entry["bbox"]
        right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
        if right <= max(x, 0) or bottom <= max(y, 0):
            useless.append(entry["id"])
    if useless:
        logger.warning(
            f"{path}: {len(useless)} boxes have no area inside their image, for example "
            f"annotation {useless[0]}. Training leaves them out, evaluation counts them as missed."
        )
    if empty := len(images) - len({entry["image_id"] for entry in annotations}):
        logger.warning(
            f"{path}: {empty} of {len(images)} images have no annotations. Training leaves them "
            f"out unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False."
        )
    used = {entry["category_id"] for entry in annotations}
    if unused := [category for category in categories if category["id"] not in used]:
        logger.info(
            f"{path}: {len(unused)} of {len(categories)} categories have no annotations, for "
            f"example {shown(unused[0]['name'])} (id {shown(unused[0]['id'])})."
        )
    if any("neg_category_ids" in image for image in content["images"]):
        logger.warning(
            f"{path} is a file of LVIS, in which not every object is labelled. COCO's metrics "
            f"count what is found beyond that as mistakes, LVIS's own do not."
        )
