"""The built-in detection dataset: drawn shapes with COCO annotations, nothing to download.

Classes differ by shape and never by colour: every object gets a random size, rotation, squash,
texture and pair of vivid colours, on a greyish background of clouds, texture and clutter that
resembles no class. About a third of the objects are partly hidden by another one; annotations
describe the visible part. Objects are drawn at :data:`OVERSAMPLING` times the image's resolution,
so that edges are anti-aliased and polygons, boxes and areas are exact to a fraction of a pixel.

Everything follows from :class:`ShapesSpec`: an image depends on the seed, its split and its number
only, so two runs write the same bytes, and a larger dataset begins with the images of a smaller
one. The files are written once, to a cache folder, when a registered dataset is first asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from colorsys import hsv_to_rgb
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from repr_det.errors import UserError

logger = logging.getLogger(f"detectron2.{__name__}")

OVERSAMPLING = 4
"""Masks are drawn at this many times the resolution of the image, along each side."""

FORMAT = 2
"""Part of the cache folder's name; to be raised whenever the drawing below changes."""

_SPLITS = ("train", "val")
_RADIUS = (0.14, 0.25)  # of an object, as a share of the image's side
_TURN = np.pi / 6  # most that an object is turned, either way
_HIDDEN = (0.15, 0.50)  # least and most that a partly hidden object loses of its area
_HIDE = 0.4  # how often a new object is placed so that it hides part of an earlier one
_TRIES = 40  # places tried for one object before another is tried instead
_GIVE_UPS = 50  # objects of one image for which no place may be found


@dataclass(frozen=True)
class ShapesSpec:
    """What determines the dataset, byte for byte.

    Attributes:
        seed: seed of all random draws.
        size: height and width of every image, in pixels.
        train: number of training images.
        val: number of held-out images.
        objects: fewest and most objects in an image.
        jpeg_quality: quality of the image files, 1 to 100.
    """

    seed: int = 0
    size: int = 96
    train: int = 1000
    val: int = 150
    objects: tuple[int, int] = (5, 7)
    jpeg_quality: int = 95


@dataclass(frozen=True)
class Scene:
    """One drawn image with its objects in the order of drawing: later ones hide earlier ones.

    Attributes:
        image: uint8 (size, size, 3), BGR.
        classes: int (objects,), indices into :data:`CLASSES`.
        full: bool (objects, size * OVERSAMPLING, size * OVERSAMPLING), each object on its own.
        visible: bool, same shape, what of it is to be seen.
    """

    image: np.ndarray
    classes: np.ndarray
    full: np.ndarray
    visible: np.ndarray


# --- shapes: each a list of closed outlines, (points, 2), about the origin, in the unit circle


def _on_circle(angles: np.ndarray, radii: np.ndarray | float = 1.0) -> np.ndarray:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _regular(corners: int) -> np.ndarray:
    """An upright polygon: its lowest edge is level."""
    return _on_circle(np.pi / 2 + 2 * np.pi * (np.arange(corners) + 0.5) / corners)


def _disc(rng: np.random.Generator) -> list[np.ndarray]:
    return [_regular(64)]


def _ring(rng: np.random.Generator) -> list[np.ndarray]:
    return [_regular(64), rng.uniform(0.45, 0.62) * _regular(64)]


def _triangle(rng: np.random.Generator) -> list[np.ndarray]:
    return [_regular(3)]


def _corner(rng: np.random.Generator) -> list[np.ndarray]:
    end, arm = np.sqrt(0.5), rng.uniform(0.4, 0.55)
    inner = arm - end
    across = [[-end, -end], [inner, -end], [inner, -inner], [end, -inner], [end, end], [-end, end]]
    return [np.array(across)]


def _star(rng: np.random.Generator) -> list[np.ndarray]:
    radii = np.tile([1.0, rng.uniform(0.36, 0.44)], 5)
    return [_on_circle(2 * np.pi * np.arange(10) / 10 - np.pi / 2, radii)]


def _cross(rng: np.random.Generator) -> list[np.ndarray]:
    arm = rng.uniform(0.2, 0.28)
    quarter = np.array([[1.0, -arm], [1.0, arm], [arm, arm]])
    turns = [_rotation(k * np.pi / 2) for k in range(4)]
    return [np.concatenate([quarter @ turn.T for turn in turns]) / np.hypot(1.0, arm)]


_OUTLINES: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
    "disc": _disc,
    "ring": _ring,
    "triangle": _triangle,
    "corner": _corner,
    "star": _star,
    "cross": _cross,
}

CLASSES: tuple[str, ...] = tuple(_OUTLINES)
"""Names of the classes, by contiguous id; COCO's ``category_id`` is one more."""


def _rotation(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _random_pose(
    rng: np.random.Generator,
    outlines: list[np.ndarray],
    size: int,
    near: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, tuple[slice, slice]]:
    """Draw ``outlines`` scaled, squashed, rotated and moved at random: anywhere, or about ``near``.

    Returns the centre (x, y) in pixels, an oversampled bool mask, and the rows and columns of the
    oversampled image that the mask is for.
    """
    radius = size * np.exp(rng.uniform(*np.log(_RADIUS)))
    squash = np.diag([1.0, rng.uniform(0.8, 1.0)])
    spin, tilt = _rotation(rng.uniform(-_TURN, _TURN)), _rotation(rng.uniform(0, np.pi))
    centre = rng.uniform(0, size, size=2) if near is None else rng.normal(near, radius)
    centre = centre.clip(0.6 * radius, size - 0.6 * radius)
    pose = radius * OVERSAMPLING * (tilt @ squash @ tilt.T @ spin).T
    points = [np.round(o @ pose + centre * OVERSAMPLING).astype(np.int32) for o in outlines]
    corner = np.maximum(points[0].min(axis=0), 0)
    width, height = np.minimum(points[0].max(axis=0) + 1, size * OVERSAMPLING) - corner
    mask = np.zeros((height, width), dtype=np.uint8)
    # fillPoly fills by the even-odd rule, which is what cuts the hole out of a ring
    cv2.fillPoly(mask, [p - corner for p in points], 1)
    x, y = corner
    return centre, mask.astype(bool), np.s_[y : y + height, x : x + width]


def _place_objects(
    rng: np.random.Generator, size: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find places for ``count`` objects: ``classes``, ``full``, ``visible`` of a :class:`Scene`."""
    classes: list[int] = []
    centres: list[np.ndarray] = []
    full = np.zeros((count, size * OVERSAMPLING, size * OVERSAMPLING), dtype=bool)
    owner = np.full(full.shape[1:], count, dtype=np.uint16)  # the object on top, or count for none
    areas, seen = np.zeros(count), np.zeros(count)  # pixels of the whole and of the visible object
    for _ in range(count + _GIVE_UPS + 1):
        done = len(classes)
        if done == count:
            return (
                np.array(classes),
                full,
                owner == np.arange(count, dtype=owner.dtype)[:, None, None],
            )
        label = int(rng.integers(len(CLASSES)))
        whole = np.flatnonzero(seen[:done] == areas[:done])
        hidden = rng.choice(whole) if len(whole) and rng.random() < _HIDE else None
        near = None if hidden is None else centres[hidden]
        for _ in range(_TRIES):
            outlines = _OUTLINES[CLASSES[label]](rng)
            centre, mask, window = _random_pose(rng, outlines, size, near)
            lost = np.bincount(owner[window][mask], minlength=count + 1)[:done]
            covered = 1 - (seen[:done] - lost) / areas[:done]
            if hidden is None:
                accepted = not lost.any()
            else:
                accepted = covered[hidden] >= _HIDDEN[0] and covered.max() <= _HIDDEN[1]
            if accepted:
                owner[window][mask] = done
                full[done][window] = mask
                seen[:done] -= lost
                areas[done] = seen[done] = np.count_nonzero(mask)
                classes.append(label)
                centres.append(centre)
                break
    raise UserError(
        f"{count} objects do not fit into an image of {size} pixels. Lower the number of objects."
    )


# --- colours and textures: float32 BGR, 0 to 255


def _noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: int, channels: int = 1
) -> np.ndarray:
    """Smooth random field in [0, 1], (*shape, channels), from ``cells`` values a side."""
    coarse = rng.random((cells, cells, channels), dtype=np.float32)
    fine = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(fine.reshape(*shape, channels), 0, 1)


def _pattern(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Mixing weights in [0, 1], (*shape, 1): plain, gradient, stripes, checks, dots or clouds."""
    kind = rng.integers(6)
    period = rng.uniform(5, 12)  # pixels
    cos, sin = _rotation(rng.uniform(0, 2 * np.pi))[0].astype(np.float32)
    ys, xs = np.ogrid[: shape[0], : shape[1]]
    u, v = cos * xs + sin * ys, cos * ys - sin * xs
    if kind == 0:
        weights = np.zeros(shape)
    elif kind == 1:
        weights = (u - u.min()) / np.ptp(u)
    elif kind == 2:
        weights = 0.5 + 0.5 * np.sin(2 * np.pi * u / period)
    elif kind == 3:
        weights = (u // period + v // period) % 2
    elif kind == 4:
        weights = (u % period - period / 2) ** 2 + (v % period - period / 2) ** 2 < period**2 / 12
    else:
        return _noise(rng, shape, int(rng.integers(4, 10)))
    return weights.astype(np.float32)[..., None]


def _colours(rng: np.random.Generator, against: np.ndarray) -> np.ndarray:
    """Two vivid colours of about one hue, (2, 3), both well apart from the colour ``against``."""
    while True:
        hues = rng.random() + rng.normal(0, 0.02, size=2)
        rest = rng.uniform(0.65, 1, size=2) + rng.uniform(-0.12, 0.12, size=(2, 2))
        rest = rest.clip(0, 1)  # saturation and value
        pair = 255 * np.array([hsv_to_rgb(h % 1, *sv) for h, sv in zip(hues, rest, strict=True)])
        if np.linalg.norm(pair - against, axis=1).min() > 90:
            return pair.astype(np.float32)


def _greyish(rng: np.random.Generator, lightness: float) -> np.ndarray:
    return np.clip(lightness + rng.normal(0, 10, size=3), 0, 255).astype(np.float32)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Canvas (size, size, 3): greyish clouds, a faint pattern, strokes, arcs and long blobs."""
    lightness = rng.uniform(50, 205)
    cells = int(rng.integers(2, 6))
    canvas = _greyish(rng, lightness) + 80 * (_noise(rng, (size, size), cells) - 0.5)
    canvas += 30 * (_noise(rng, (size, size), cells, channels=3) - 0.5)
    canvas += rng.uniform(0, 45) * (_pattern(rng, (size, size)) - 0.5)
    for _ in range(rng.integers(6, 14)):
        colour = _greyish(rng, lightness + rng.normal(0, 60)).tolist()
        start = rng.uniform(0, size, size=2)
        kind = rng.integers(3)
        if kind == 0:  # a bent stroke
            steps = rng.normal(0, size / 12, size=(5, 2)) + rng.normal(0, size / 12, size=2)
            points = np.round(start + np.cumsum(steps, axis=0)).astype(np.int32)
            cv2.polylines(canvas, [points], False, colour, int(rng.integers(1, 3)), cv2.LINE_AA)
        elif kind == 1:  # an open arc
            axes = [int(a) for a in rng.uniform(size / 24, size / 6, size=2)]
            begin = rng.uniform(0, 360)
            ends = (begin, begin + rng.uniform(60, 200))
            centre = [int(c) for c in start]
            cv2.ellipse(
                canvas, centre, axes, 0, *ends, colour, int(rng.integers(1, 3)), cv2.LINE_AA
            )
        else:  # a blob several times as long as wide, unlike any class even when that is squashed
            long = rng.uniform(size / 20, size / 7)
            axes = [int(long), max(1, int(long * rng.uniform(0.12, 0.3)))]
            centre = [int(c) for c in start]
            angle = rng.uniform(0, 360)
            cv2.ellipse(canvas, centre, axes, angle, 0, 360, colour, -1, cv2.LINE_AA)
    return canvas


def _coverage(mask: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """Share of each pixel of a part of the image that the oversampled ``mask`` covers, float32."""
    k = OVERSAMPLING
    part = mask[rows.start * k : rows.stop * k, columns.start * k : columns.stop * k]
    shape = (columns.stop - columns.start, rows.stop - rows.start)
    return cv2.resize(255 * part.view(np.uint8), shape, interpolation=cv2.INTER_AREA) / np.float32(
        255
    )


def draw_scene(rng: np.random.Generator, size: int, objects: tuple[int, int]) -> Scene:
    """Draw one image.

    Args:
        rng: where every random draw comes from.
        size: height and width, in pixels.
        objects: fewest and most objects.

    Raises:
        UserError: if that many objects do not fit.
    """
    count = int(rng.integers(objects[0], objects[1] + 1))
    classes, full, visible = _place_objects(rng, size, count)
    canvas = _background(rng, size)
    for mask in full:
        x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
        rows = slice(y // OVERSAMPLING, -(-(y + h) // OVERSAMPLING))
        columns = slice(x // OVERSAMPLING, -(-(x + w) // OVERSAMPLING))
        spot = canvas[rows, columns]
        alpha = _coverage(mask, rows, columns)
        first, second = _colours(rng, against=spot[alpha > 0].mean(axis=0))
        spot += alpha[..., None] * (first + (second - first) * _pattern(rng, alpha.shape) - spot)
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.2, 0.7))
    canvas += rng.uniform(1, 7) * rng.standard_normal(canvas.shape, dtype=np.float32)
    image = np.clip(np.round(canvas), 0, 255).astype(np.uint8)
    return Scene(image, classes, full, visible)


# --- files


def _polygons(mask: np.ndarray, corner: np.ndarray) -> list[list[float]]:
    """Outlines of an oversampled mask as COCO polygons in pixels of the image.

    ``corner`` (x, y) is the position of the mask's first pixel in the oversampled image.

    Polygons cannot have holes, so a mask with one is cut along a column through it, and the two
    parts are outlined on their own.
    """
    # contours run through centres of pixels, so half a pixel inside: doubling the scale halves that
    finer = mask.repeat(2, axis=0).repeat(2, axis=1).view(np.uint8)
    outlines, nesting = cv2.findContours(finer, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    holes = [o for o, (_, _, _, parent) in zip(outlines, nesting[0], strict=True) if parent >= 0]
    holes = [hole for hole in holes if cv2.contourArea(hole) > (2 * OVERSAMPLING) ** 2]
    if holes:
        cut = int(holes[0][:, 0, 0].mean()) // 2
        left, right = mask.copy(), mask.copy()
        left[:, cut:], right[:, :cut] = False, False
        return _polygons(left, corner) + _polygons(right, corner)
    polygons = []
    for outline, (_, _, _, parent) in zip(outlines, nesting[0], strict=True):
        points = (cv2.approxPolyDP(outline, 1.6, True)[:, 0] + 0.5) / 2
        if parent < 0 and len(points) >= 3:
            polygons.append(((points + corner) / OVERSAMPLING).round(3).ravel().tolist())
    return polygons


def _annotations(scene: Scene) -> list[dict[str, Any]]:
    """COCO annotations of the visible parts, without ``id`` and ``image_id``.

    ``visibility`` is an addition to the format: the visible share of the object, 0 to 1.
    """
    found = []
    for label, full, visible in zip(scene.classes, scene.full, scene.visible, strict=True):
        x, y, w, h = cv2.boundingRect(visible.view(np.uint8))
        area = np.count_nonzero(visible)
        found.append(
            {
                "category_id": int(label) + 1,
                "bbox": [edge / OVERSAMPLING for edge in (x, y, w, h)],
                "area": area / OVERSAMPLING**2,
                "iscrowd": 0,
                "segmentation": _polygons(visible[y : y + h, x : x + w], np.array([x, y])),
                "visibility": round(area / np.count_nonzero(full), 4),
            }
        )
    return found


def _draw_split(spec: ShapesSpec, split: str, folder: Path) -> Iterator[tuple[dict, list[dict]]]:
    """Write the images of ``split`` to ``folder``; yield each one's COCO entry and annotations."""
    for number in range(getattr(spec, split)):
        rng = np.random.default_rng([spec.seed, _SPLITS.index(split), number])
        scene = draw_scene(rng, spec.size, spec.objects)
        name = f"{number:06d}.jpg"
        if not cv2.imwrite(
            str(folder / name), scene.image, [cv2.IMWRITE_JPEG_QUALITY, spec.jpeg_quality]
        ):
            raise OSError(f"Cannot write {folder / name}: is the disk full?")
        entry = {"id": number + 1, "file_name": name, "height": spec.size, "width": spec.size}
        annotations = [{"image_id": number + 1, **a} for a in _annotations(scene)]
        yield entry, annotations


def _write_json(path: Path, spec: ShapesSpec, drawn: list[tuple[dict, list[dict]]]) -> None:
    annotations = [annotation for _, found in drawn for annotation in found]
    content = {
        "info": {"description": "repr_det built-in shapes", "version": str(FORMAT), **asdict(spec)},
        "licenses": [],
        "categories": [
            {"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(CLASSES)
        ],
        "images": [entry for entry, _ in drawn],
        "annotations": [{"id": k + 1, **a} for k, a in enumerate(annotations)],
    }
    path.write_text(json.dumps(content))


def write_shapes(folder: Path, spec: ShapesSpec) -> None:
    """Draw the whole dataset into ``folder``, which must exist.

    Leaves ``train/`` and ``val/`` with the images and, next to them, ``train.json`` and
    ``val.json``.

    Raises:
        UserError: if the objects do not fit into the images.
        OSError: if a file cannot be written.
    """
    for split in _SPLITS:
        (folder / split).mkdir()
        drawn = list(_draw_split(spec, split, folder / split))
        _write_json(folder / f"{split}.json", spec, drawn)


def shapes_folder(spec: ShapesSpec = ShapesSpec()) -> Path:
    """The folder of the dataset of ``spec``, whether it is drawn yet or not; nothing is written.

    The folder is below ``REPR_DET_CACHE``, or below ``~/.cache/repr_det`` where that variable is
    not set, and its name changes with everything that changes the files.
    """
    root = Path(
        os.environ.get("REPR_DET_CACHE") or Path.home() / ".cache" / "repr_det"
    ).expanduser()
    key = json.dumps({"format": FORMAT, "opencv": cv2.__version__, **asdict(spec)}, sort_keys=True)
    return root / f"shapes-v{FORMAT}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


def _drawn(folder: Path, spec: ShapesSpec) -> Path:
    """Draw the dataset unless it is there already; returns the folder.

    The files are written aside and moved into place together, so an interrupted call leaves no half
    dataset, and processes that call at the same time end up with the same files.

    Raises:
        UserError: the cache folder cannot be written to.
    """
    if folder.is_dir():
        return folder
    logger.info("Drawing the built-in dataset into %s (once; takes half a minute)", folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
            whole = Path(aside) / folder.name
            whole.mkdir()
            write_shapes(whole, spec)
            try:
                whole.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
    except OSError as error:
        raise UserError(
            f"{folder.parent} cannot be written to ({error.strerror or error}). Set REPR_DET_CACHE "
            f"to a folder that can; the built-in images are drawn there."
        ) from error
    return folder


def register_shapes(spec: ShapesSpec = ShapesSpec(), prefix: str = "shapes") -> None:
    """Register ``<prefix>_train`` and ``<prefix>_val``.

    The files are drawn when one of them is first loaded. Does nothing for a name that is
    registered.
    """
    folder = shapes_folder(spec)
    for part in _SPLITS:
        name, images = f"{prefix}_{part}", folder / part
        if name in DatasetCatalog.list():
            continue

        def load(part: str = part, name: str = name, images: Path = images) -> list[dict]:
            _drawn(folder, spec)
            return load_coco_json(str(folder / f"{part}.json"), str(images), name)

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            json_file=str(folder / f"{part}.json"),
            image_root=str(images),
            evaluator_type="coco",
            drawn_on_first_use=True,
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={k + 1: k for k in range(len(CLASSES))},
        )
