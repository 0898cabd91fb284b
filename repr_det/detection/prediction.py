"""Detections on images and videos that belong to no dataset, drawn or as COCO's results."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from repr_det.detection.annotations import category_names, read_labels
from repr_det.detection.builtin import register_builtin
from repr_det.detection.datasets import num_classes, num_classes_key
from repr_det.detection.drawing import draw_instances, draw_over
from repr_det.detection.evaluation import category_ids, coco_entries, instances_of
from repr_det.engine.class_names import check_names, recorded_names
from repr_det.engine.data import SUFFIXES, first_line, images_below, is_too_thin, read_rgb
from repr_det.engine.files import write_whole, writing
from repr_det.engine.trained import load_trained
from repr_det.errors import UserError

logger = logging.getLogger(f"detectron2.{__name__}")

Pixels = NDArray[np.uint8]
"""An image (height, width, 3), RGB."""

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")

USUAL_FPS = 25.0
"""Frames a second of a video that does not say how many it has."""

_MOST_TICKS = 65535
"""Ticks a second that MPEG-4 can count."""


# --- inputs and labels


class Source(NamedTuple):
    """A file to look at.

    Attributes:
        path: of the file.
        drawn: where its picture goes, relative to the output folder.
    """

    path: Path
    drawn: Path

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its suffix."""
        return self.path.suffix.lower() in VIDEOS


def find_sources(inputs: Sequence[Path], output: Path | None = None) -> list[Source]:
    """The images and videos in files and folders.

    Args:
        inputs: images, videos, and folders, whose images are taken with those of their subfolders.
            Hidden files and folders are left out.
        output: folder in which pictures will be drawn, or None.

    Raises:
        UserError: an input that does not exist or is of neither kind, a folder without images, a
            video that cannot be read, or pictures that would replace one another or the inputs.
    """
    sources = []
    for path in inputs:
        if path.is_dir():
            found = images_below(path)
            if not found:
                raise UserError(
                    f"Folder {path} holds no images ({', '.join(SUFFIXES)}). Set another one."
                )
            sources += [Source(p, p.relative_to(path)) for p in found]
        elif not path.exists():
            raise UserError(f"Input {path} does not exist. Set images, folders or videos.")
        elif path.suffix.lower() in SUFFIXES:
            sources.append(Source(path, Path(path.name)))
        elif path.suffix.lower() in VIDEOS:
            _check_video(path)
            sources.append(Source(path, Path(path.name).with_suffix(".mp4")))
        else:
            raise UserError(
                f"Input {path} is neither an image ({', '.join(SUFFIXES)}) nor a video "
                f"({', '.join(VIDEOS)}). Set another one."
            )
    if output is not None:
        _check_drawn(sources, output)
    return sources


def _check_drawn(sources: Sequence[Source], output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file. Set a folder.")
    by_target: dict[Path, Path] = {}
    there = next(path for path in (output, *output.resolve().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"--output {output} is read-only. Set another folder.")
    inputs = {source.path.resolve() for source in sources}
    around = {folder for path in inputs for folder in path.parents}
    for source in sources:
        target = (output / source.drawn).resolve()
        if target in inputs or (target.parent in around and target.exists()):
            raise UserError(f"--output {output} would replace {target}. Set another folder.")
        if target in by_target:
            raise UserError(
                f"{by_target[target]} and {source.path} would both be drawn as {target}. Name them "
                f"in separate calls."
            )
        by_target[target] = source.path


class Labels(NamedTuple):
    """Names and ids of classes, and ids of images.

    Attributes:
        names: of the classes, by contiguous id.
        categories: their ids in COCO's results.
        images: ids of known images, by file name with slashes.
    """

    names: list[str]
    categories: list[int]
    images: dict[str, int]


def labels_for(cfg: CfgNode, annotations: Path | None = None) -> Labels:
    """Labels of a COCO annotation file, or of a registered dataset that the config names.

    Where neither is known, the names are those in the checkpoint, or else ``class 1``, ``class 2``,
    and so on, and the ids are counted from 1.

    Raises:
        UserError: no such file, not COCO's, or of another number of classes than the model, or of
            other classes than it was trained on.
    """
    count, recorded = num_classes(cfg), recorded_names(cfg.MODEL.WEIGHTS)
    if annotations is not None:
        content = read_labels(annotations)
        found = _labels_in(content)
        if len(found.names) != count:
            raise UserError(
                f"{annotations} has {len(found.names)} classes, but {num_classes_key(cfg)} is "
                f"{count}. Set annotations of the dataset that the model was trained on."
            )
        check_names(recorded, found.names, str(annotations))
        return found._replace(images={_spelled(i["file_name"]): i["id"] for i in content["images"]})
    register_builtin()
    for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        found = _labels_of(dataset)
        if found is not None and len(found.names) == count and recorded in (None, found.names):
            return found
    numbers = range(1, count + 1)
    if recorded is None or len(recorded) != count:
        recorded = [f"class {number}" for number in numbers]
    return Labels(recorded, list(numbers), {})


def _spelled(file_name: str) -> str:
    """A file name in one spelling: without ``./`` and backslashes."""
    return PureWindowsPath(file_name).as_posix()


def _labels_of(dataset: str) -> Labels | None:
    """Labels of a registered dataset, whether it was read yet or not; None where unknown."""
    if dataset not in MetadataCatalog.list():
        return None
    metadata = MetadataCatalog.get(dataset)
    if names := metadata.get("thing_classes"):
        return Labels(list(names), category_ids(dataset), {})
    if Path(metadata.get("json_file") or "").is_file():
        return _labels_in(read_labels(metadata.json_file))
    return None


def _labels_in(content: dict[str, Any]) -> Labels:
    """Labels of COCO's JSON, no images known."""
    return Labels(category_names(content), sorted(c["id"] for c in content["categories"]), {})


# --- detection


class Detector:
    """A trained detector for images in memory, which it treats as Detectron2's DefaultPredictor.

    Args:
        cfg: with its weights; see :func:`repr_det.engine.trained.load_trained`, which says what is
            refused.
        min_score: detections with a lower score are left out. The model itself leaves out those
            below its own ``SCORE_THRESH_TEST``.

    Raises:
        UserError: a score out of range, or an order of channels that images do not have.
    """

    def __init__(self, cfg: CfgNode, min_score: float = 0.5) -> None:
        if not 0 <= min_score <= 1:
            raise UserError(f"--score-threshold is {min_score}. Set a score from 0 to 1.")
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}. Set RGB or BGR.")
        self._min_score = min_score
        self._bgr = cfg.INPUT.FORMAT == "BGR"
        self._resize = T.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )
        # Longest side of an image as the model sees it; an image that would be less than half a
        # pixel wide then cannot be looked at. None for no limit.
        self.longest = cfg.INPUT.MAX_SIZE_TEST if cfg.INPUT.MIN_SIZE_TEST else None
        self._model = load_trained(cfg)

    def __call__(self, images: Sequence[Pixels]) -> list[Instances]:
        """Detections on a batch of images, in pixels of each, on the CPU."""
        with torch.no_grad():
            outputs = self._model([self._input(image) for image in images])
        found = (instances_of(output) for output in outputs)
        return [instances[instances.scores >= self._min_score] for instances in found]

    def _input(self, image: Pixels) -> dict[str, Any]:
        height, width = image.shape[:2]
        pixels = image[:, :, ::-1] if self._bgr else image
        pixels = self._resize.get_transform(pixels).apply_image(pixels)
        tensor = torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}


class _Frame(NamedTuple):
    """An image or a frame of a video, with the id and other keys of its detections."""

    source: Source
    image: Pixels
    image_id: int
    extra: dict[str, Any]


@dataclass
class Outcome:
    """What was found.

    Attributes:
        entries: COCO's results, each with the ``file_name`` of its image, and in videos with the
            ``frame``, counted from 0.
        images: how many images and frames were looked at.
        faults: what could not be read, each a part of a sentence.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    images: int = 0
    faults: list[str] = field(default_factory=list)


def predict(
    detector: Detector,
    labels: Labels,
    sources: Sequence[Source],
    output: Path | None = None,
    *,
    batch_size: int = 1,
    progress: bool = False,
) -> Outcome:
    """Detect on images and videos, and draw.

    Images are drawn by :func:`repr_det.detection.drawing.draw_over`, and videos, without keypoints,
    by :func:`repr_det.detection.drawing.draw_instances`. What cannot be read is left out and named
    in the outcome.

    Args:
        detector: what detects.
        labels: names and ids for the results. ``image_id`` is that of the labels for a file name,
            relative to its folder; other images and frames are numbered after those.
        sources: from :func:`find_sources`.
        output: folder for the pictures and videos, made when there is something to write; None to
            draw nothing.
        batch_size: images in a batch.
        progress: show a bar.

    Raises:
        UserError: several images are the same one of the labels, not one image could be read, or
            a picture or video cannot be written.
    """
    outcome = Outcome()
    videos = [source for source in sources if source.is_video]
    images = [source for source in sources if not source.is_video]
    numbers = _new_ids(labels, images)
    total = len(images) + sum(map(_length, videos))
    with tqdm(total=total, desc="Detecting", unit="image", disable=not progress) as bar:

        def look(frames: Iterable[_Frame], draw: Callable[[_Frame, Instances], None]) -> None:
            for batch in _batches(frames, batch_size):
                _look(detector, batch, labels, outcome, draw if output is not None else None)
                bar.update(len(batch))

        def save(frame: _Frame, found: Instances) -> None:
            _save(output / frame.source.drawn, draw_over(frame.image, found, labels.names))

        look(_read_images(images, labels, numbers, outcome.faults, detector.longest), save)
        if not outcome.images and not videos:
            others = f", nor can the other {len(images) - 1}" if len(images) > 1 else ""
            raise UserError(f"Image {outcome.faults[0]} cannot be read{others}.")
        for video in videos:
            with _video_file(output and output / video.drawn, video) as write:
                # Detectron2's Visualizer takes 15 to 35 times as long for a frame.
                def film(frame: _Frame, found: Instances, write: Any = write) -> None:
                    write(draw_instances(frame.image, found, labels.names, side=0, min_score=0))

                look(_read_frames(video, numbers, outcome.faults), film)
    return outcome


def _look(
    detector: Detector,
    batch: Sequence[_Frame],
    labels: Labels,
    outcome: Outcome,
    draw: Callable[[_Frame, Instances], None] | None,
) -> None:
    """Detect on a batch, draw, and add what was found to the outcome."""
    for frame, found in zip(batch, detector([f.image for f in batch]), strict=True):
        if draw is not None:
            draw(frame, found)
        for entry in coco_entries(found, frame.image_id, labels.categories):
            outcome.entries.append({**entry, **frame.extra})
    outcome.images += len(batch)


def _new_ids(labels: Labels, images: Sequence[Source]) -> Iterator[int]:
    """Ids for images and frames that the labels do not know.

    Raises:
        UserError: several images are the same one of the labels.
    """
    names = Counter(_spelled(str(source.drawn)) for source in images)
    if twice := [name for name in labels.images if names[name] > 1]:
        raise UserError(
            f"Several images are {twice[0]} of the annotations. Name them in separate calls."
        )
    unknown = sum(name not in labels.images for name in names)
    if labels.images and unknown:
        logger.warning(
            f"{unknown} of {len(names)} images are not in the annotations. They get new ids."
        )
    # Ids may be strings, too.
    known = (number for number in labels.images.values() if isinstance(number, int))
    return itertools.count(max(known, default=0) + 1)


def _batches(frames: Iterable[_Frame], size: int) -> Iterator[list[_Frame]]:
    frames = iter(frames)
    while batch := list(itertools.islice(frames, size)):
        yield batch


def _read_images(
    sources: Iterable[Source],
    labels: Labels,
    numbers: Iterator[int],
    faults: list[str],
    longest: int | None,
) -> Iterator[_Frame]:
    for source in sources:
        try:
            image = read_rgb(source.path)
        except Exception as error:  # each decoder has its own
            faults.append(f"{source.path} ({first_line(error)})")
            continue
        height, width = image.shape[:2]
        if longest is not None and is_too_thin(width, height, longest):
            faults.append(f"{source.path} (it is too thin, {width} x {height})")
            continue
        name = _spelled(str(source.drawn))
        image_id = labels.images[name] if name in labels.images else next(numbers)
        yield _Frame(source, image, image_id, {"file_name": str(source.path)})


def _save(path: Path, picture: Pixels) -> None:
    kind = Image.registered_extensions()[path.suffix.lower()]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: Image.fromarray(picture).save(file, kind, quality=95))


# --- videos


@contextmanager
def _opened(path: Path) -> Iterator[cv2.VideoCapture]:
    """A video to read."""
    capture = cv2.VideoCapture(str(path.absolute()))  # a colon in a bare name is a protocol's
    try:
        yield capture
    finally:
        capture.release()


def _check_video(path: Path) -> None:
    with _opened(path) as capture:
        if not capture.read()[0]:
            raise UserError(f"Video {path} cannot be read. Set another, or convert it to .mp4.")


def _fps(capture: cv2.VideoCapture) -> float:
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if math.isfinite(fps) and fps > 0 else USUAL_FPS


def writable_fps(fps: float) -> float:
    """The nearest rate, in frames a second, that OpenCV can write into an MPEG-4 video.

    OpenCV counts time in ticks of a frame, of which it takes 1, 10, 100 or 1,000 so that the rate
    is right to 0.001.
    """
    decimals = next((d for d in (3, 2, 1) if fps * 10**d <= _MOST_TICKS), 0)
    return min(round(fps, decimals), _MOST_TICKS)


def _length(video: Source) -> int:
    with _opened(video.path) as capture:
        return max(1, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


def _read_frames(video: Source, numbers: Iterator[int], faults: list[str]) -> Iterator[_Frame]:
    with _opened(video.path) as capture:
        for number in itertools.count():
            there, pixels = capture.read()
            if not there:
                break
            extra = {"file_name": str(video.path), "frame": number}
            image = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
            yield _Frame(video, image, next(numbers), extra)
        promised = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        # Some containers only estimate their number of frames.
        if promised - number > _fps(capture):
            faults.append(f"{video.path} (after frame {number} of {promised:.0f})")


@contextmanager
def _video_file(target: Path | None, video: Source) -> Iterator[Callable[[Pixels], None] | None]:
    """A function that writes pictures into a video, whole or not at all; None for no video.

    Raises:
        UserError: it cannot be written.
    """
    if target is None:
        yield None
        return
    aside = target.with_name(f".{target.stem}.writing.mp4")
    with _opened(video.path) as capture:
        fps = writable_fps(_fps(capture))
    writer = cv2.VideoWriter()
    given = 0

    def write(picture: Pixels) -> None:
        nonlocal given
        if not writer.isOpened():
            target.parent.mkdir(parents=True, exist_ok=True)
            code = cv2.VideoWriter_fourcc(*"mp4v")
            if not writer.open(str(aside), code, fps, picture.shape[1::-1]):
                raise UserError(
                    f"Video {target} cannot be written by OpenCV ({picture.shape[1]} x "
                    f"{picture.shape[0]} pixels, {fps:g} frames a second). Set --json instead of "
                    f"--output."
                )
        writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        given += 1

    try:
        yield write
        writer.release()
        with _opened(aside) as made:
            written = int(made.get(cv2.CAP_PROP_FRAME_COUNT))
        if written < given:  # OpenCV says nothing
            raise UserError(
                f"Video {target} cannot be written whole, but {written} of {given} frames. Free "
                f"some space, or convert {video.path} to one size of frames."
            )
        os.replace(aside, target)
    finally:
        writer.release()
        aside.unlink(missing_ok=True)
