"""The command line of repr-det predict."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from PIL import Image

from repr_det.cli import main
from repr_det.detection.prediction import (
    Labels,
    find_sources,
    labels_for,
    predict,
    writable_fps,
)
from repr_det.tasks import trained_detector_cfg
from tests.detectors import make_run
from tests.images import written_in_many_ways

FRAMES = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def predictor(run):
    """Detectron2's own, to compare with."""
    return DefaultPredictor(run.cfg)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A moving square on noise."""
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12.5, (64, 48))
    assert writer.isOpened()
    noise = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    background = cv2.resize(noise, (64, 48))
    for number in range(FRAMES):
        frame = background.copy()
        frame[10:30, 5 * number : 5 * number + 20] = (30, 200, 60)
        writer.write(frame)
    writer.release()
    return path


def call(run, *arguments):
    return main(["predict", *map(str, (run.folder, *arguments))])


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (frame := capture.read())[0]:
        frames.append(frame[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def expected(predictor, pixels, threshold, **extra):
    """DefaultPredictor's detections of a BGR image, classes counted from 1."""
    entries = instances_to_coco_json(predictor(pixels)["instances"], 0)
    return [
        {**entry, "category_id": entry["category_id"] + 1, **extra}
        for entry in entries
        if entry["score"] >= threshold
    ]


def as_json(entries):
    return json.loads(json.dumps(entries))


def middle_score(run, predictor):
    scores = torch.cat([predictor(cv2.imread(str(p)))["instances"].scores for p in images(run)])
    return float(scores.median())


def images(run):
    return sorted(run.images.iterdir())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_folder(run, predictor, tmp_path, capsys, batch_size):
    """The JSON is what the model says; pictures differ from the images where the boxes are."""
    threshold = middle_score(run, predictor)
    out, found = tmp_path / "drawn", tmp_path / "found.json"
    options = ["--score-threshold", threshold, "--batch-size", batch_size]
    assert call(run, run.images, "--output", out, "--json", found, *options) == 0
    entries = json.loads(found.read_text())
    paths = images(run)
    wanted = []
    for number, path in enumerate(paths, 1):
        extra = {"image_id": number, "file_name": str(path)}
        wanted += expected(predictor, cv2.imread(str(path)), threshold, **extra)
    if batch_size == 1:
        assert entries == as_json(wanted)
    # Images of one batch are padded to one size, which may change what is seen near the border.
    assert len(entries) > 0 and {e["file_name"] for e in entries} <= set(map(str, paths))
    printed = capsys.readouterr()
    assert printed.out == f"{len(entries):,} detections on 3 images.\n"
    assert "Detecting" in printed.err
    assert sorted(p.name for p in out.iterdir()) == [p.name for p in paths]
    for path in paths:
        image, drawn = cv2.imread(str(path)), cv2.imread(str(out / path.name))
        zoom = 6  # what makes 60 to 64 pixels about 384
        image = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        assert drawn.shape == image.shape
        changed = (image != drawn).any(axis=2)
        boxes = [e["bbox"] for e in entries if e["file_name"] == str(path)]
        assert bool(boxes) == bool(changed.any())
        for x, y, w, h in boxes:
            left, top, right, bottom = (int(zoom * v) for v in (x, y, x + w, y + h))
            assert changed[top : bottom + 2, left : right + 2].any()


def rgb(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_images_are_seen_as_they_are_meant(run, tmp_path):
    """Grey, of a palette, transparent, or turned by EXIF: by what is handed to the detector."""
    written = written_in_many_ways(tmp_path, rgb(run.images / "0.png"))
    handed = []

    def detector(images):
        handed.extend(images)
        nothing = {"pred_boxes": Boxes(torch.zeros(0, 4)), "scores": torch.zeros(0)}
        nothing["pred_classes"] = torch.zeros(0, dtype=torch.int64)
        return [Instances(image.shape[:2], **nothing) for image in images]

    detector.longest = None
    sources = find_sources([image.path for image in written])
    outcome = predict(detector, Labels([], [], {}), sources, batch_size=4)
    assert outcome.images == len(written) == 13 and not outcome.faults
    for (path, seen), image in zip(written, handed, strict=True):
        assert np.array_equal(image, seen), path.name


def test_a_turned_image_gives_what_the_upright_one_does(run, predictor, tmp_path):
    written = written_in_many_ways(tmp_path, rgb(run.images / "0.png"))
    ((path, seen),) = [image for image in written if image.path.name == "turned_6.jpg"]
    out, found = tmp_path / "drawn", tmp_path / "found.json"
    options = ["--output", out, "--json", found, "--score-threshold", 0]
    assert call(run, path, *options) == 0
    extra = {"image_id": 1, "file_name": str(path)}
    wanted = expected(predictor, seen[:, :, ::-1], 0, **extra)
    assert wanted and json.loads(found.read_text()) == as_json(wanted)
    height, width, _ = rgb(out / path.name).shape
    assert rgb(path).shape == (64, 48, 3) and (height, width) == (6 * 48, 6 * 64)


def test_names_and_ids_of_an_annotation_file(run, predictor, tmp_path, caplog):
    """Found detections can be evaluated on that file; images that it does not know come behind."""
    extra = tmp_path / "other.png"
    extra.write_bytes((run.images / "0.png").read_bytes())
    found = tmp_path / "found.json"
    options = ["--annotations", run.annotations, "--score-threshold", 0, "--json", found]
    assert call(run, run.images, extra, *options) == 0
    assert "1 of 4 images are not in the annotations" in caplog.text
    entries = json.loads(found.read_text())
    ids = {entry["file_name"]: entry["image_id"] for entry in entries}
    assert ids == {str(run.images / f"{n}.png"): 9 - n for n in range(3)} | {str(extra): 10}
    wanted = [
        {**e, "category_id": 10 * (e["category_id"] - 1) + 3}
        for e in expected(predictor, cv2.imread(str(extra)), 0, image_id=10, file_name=str(extra))
    ]
    assert [e for e in entries if e["image_id"] == 10] == as_json(wanted)
    known = [e for e in entries if e["image_id"] != 10]
    found.write_text(json.dumps(known))
    arguments = ["--results", found, "--annotations", run.annotations]
    assert main(["eval", *map(str, arguments)]) == 0


def test_file_names_may_be_spelled_in_other_ways(run, tmp_path, caplog):
    content, photos = json.loads(run.annotations.read_text()), tmp_path / "photos"
    for number, image in enumerate(content["images"]):
        source = run.images / image["file_name"]
        target = photos / ("deep" if number else "") / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        image["file_name"] = f"deep\\{source.name}" if number else f"./{source.name}"
    (tmp_path / "file.json").write_text(json.dumps(content))
    options = ["--annotations", tmp_path / "file.json", "--json", tmp_path / "found.json"]
    assert call(run, photos, *options, "--score-threshold", 0) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    ids = {Path(entry["file_name"]).name: entry["image_id"] for entry in found}
    assert ids == {f"{n}.png": 9 - n for n in range(3)}
    assert "are not in the annotations" not in caplog.text


def test_names_of_a_dataset_that_nobody_has_read_yet(run):
    register_coco_instances("unread", {}, str(run.annotations), str(run.images))
    try:
        cfg = trained_detector_cfg(run.folder, None, ["DATASETS.TEST", "('unread',)"])
        labels = labels_for(cfg)
        content = json.loads(run.annotations.read_text())
        assert labels.names == [c["name"] for c in content["categories"]]
        assert labels.categories == [c["id"] for c in content["categories"]]
    finally:
        DatasetCatalog.remove("unread")
        MetadataCatalog.remove("unread")


def test_two_images_of_one_name_in_the_annotations(run, tmp_path, capsys):
    again = tmp_path / "0.png"
    again.write_bytes((run.images / "0.png").read_bytes())
    options = ["--annotations", run.annotations, "--json", tmp_path / "found.json"]
    assert call(run, run.images, again, *options) == 2
    assert "Several images are 0.png of the annotations" in capsys.readouterr().err


def test_a_video(run, predictor, video, tmp_path):
    out, found = tmp_path / "drawn", tmp_path / "found.json"
    assert call(run, video, "--output", out, "--json", found, "--score-threshold", 0) == 0
    frames, fps = frames_of(video)
    assert len(frames) == FRAMES
    wanted = []
    for number, frame in enumerate(frames):
        extra = {"image_id": number + 1, "file_name": str(video), "frame": number}
        wanted += expected(predictor, frame, 0, **extra)
    assert json.loads(found.read_text()) == as_json(wanted)
    assert [path.name for path in out.iterdir()] == ["clip.mp4"]
    drawn, drawn_fps = frames_of(out / "clip.mp4")
    assert len(drawn) == FRAMES and drawn_fps == pytest.approx(fps)
    plain = np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(frames, drawn, strict=True)])
    assert drawn[0].shape == frames[0].shape and plain > 5


def test_a_video_with_a_colon_in_its_name(video, tmp_path, monkeypatch):
    """FFmpeg takes what comes before it for a protocol."""
    monkeypatch.chdir(tmp_path)
    name = Path("2024-01-01T10:00:00.mp4")
    name.write_bytes(video.read_bytes())
    (source,) = find_sources([name])
    assert source.is_video


def test_a_damaged_image_among_others(run, tmp_path, capsys):
    folder = tmp_path / "photos" / "deep"
    folder.mkdir(parents=True)
    content = (run.images / "0.png").read_bytes()
    (folder / "good.png").write_bytes(content)
    (folder / "half.png").write_bytes(content[:200])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("nothing to look at")
    out = tmp_path / "drawn"
    assert call(run, tmp_path / "photos", "--output", out, "--score-threshold", 0) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("2 could not be read: ")
    assert f"{folder / 'half.png'} (" in line and f"{folder / 'text.jpg'} (" in line
    assert [p.relative_to(out).as_posix() for p in out.rglob("*.*")] == ["deep/good.png"]


def test_a_video_that_breaks_off(run, tmp_path, capsys):
    path = tmp_path / "long.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 2, (64, 48))
    rng = np.random.default_rng(0)
    for _ in range(10):
        writer.write(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert call(run, path, "--json", tmp_path / "found.json") == 1
    assert f"1 could not be read: {path} (after frame" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def inputs(tmp_path, run, monkeypatch):
    """A folder to be in, with things that cannot be looked at."""
    monkeypatch.chdir(tmp_path)
    content = (run.images / "0.png").read_bytes()
    (tmp_path / "good.png").write_bytes(content)
    (tmp_path / "half.png").write_bytes(content[:200])
    (tmp_path / "clip.mp4").write_text("no video")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "good.png").write_bytes(content)
    (tmp_path / "below" / "deep").mkdir(parents=True)
    for name in ("below/twin.png", "below/deep/twin.png"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "one.json").write_text(
        json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]})
    )
    return tmp_path


@pytest.mark.parametrize(
    ("more", "options", "sentence"),
    [
        ([], [], "Nothing would be written. Set --output FOLDER, --json FILE, or both"),
        ([], ["--json", "no/found.json"], "Folder no of --json does not exist"),
        (["missing.png"], ["--output", "out"], "Input missing.png does not exist"),
        (["notes.txt"], ["--output", "out"], "Input notes.txt is neither an image"),
        (["empty"], ["--output", "out"], "Folder empty holds no images"),
        (["clip.mp4"], ["--output", "out"], "Video clip.mp4 cannot be read"),
        (["twin"], ["--output", "out"], "would both be drawn as"),
        ([], ["--output", "."], "--output . would replace"),
        (["below/deep/twin.png"], ["--output", "below"], "--output below would replace"),
        ([], ["--json", "good.png"], "--json good.png is a file that this command also reads"),
        (
            ["--annotations", "one.json"],
            ["--json", "one.json"],
            "--json one.json is a file that this command also reads",
        ),
        ([], ["--output", "notes.txt"], "--output notes.txt is a file. Set a folder"),
        ([], ["--output", "out", "--batch-size", "0"], "--batch-size is 0. Set it to 1 or more"),
        ([], ["--output", "out", "--score-threshold", "1.5"], "--score-threshold is 1.5"),
        ([], ["--output", "out", "--annotations", "no.json"], "no.json does not exist"),
        ([], ["--output", "out", "--annotations", "one.json"], "one.json has 1 classes, but"),
        ([], ["--output", "out", "INPUT.NO_KEY", "1"], "Non-existent key: INPUT.NO_KEY"),
        ([], ["--output", "out", "INPUT.FORMAT", "L"], "INPUT.FORMAT is L"),
        ([], ["--output", "out", "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
    ],
)
def test_mistakes_are_told_in_one_sentence(run, inputs, capsys, more, options, sentence):
    before = set(inputs.rglob("*"))
    assert main(["predict", str(run.folder), "good.png", *more, *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("repr-det predict: error: ")]
    assert sentence in line and line == lines[-1]
    assert set(inputs.rglob("*")) == before


def test_folders_and_images_may_be_called_like_keys_of_the_config(run, inputs):
    (inputs / "TEST").mkdir()
    for name in ("TEST/a.png", "INPUT.png"):
        (inputs / name).write_bytes((inputs / "good.png").read_bytes())
    assert call(run, "TEST", "INPUT.png", "--output", "drawn") == 0
    assert {path.name for path in (inputs / "drawn").iterdir()} == {"a.png", "INPUT.png"}


def test_a_picture_that_cannot_be_written(run, inputs, tmp_path, capsys):
    (tmp_path / "out" / "good.png").mkdir(parents=True)
    assert call(run, "good.png", "--output", tmp_path / "out") == 2
    assert "good.png cannot be written (Is a directory)" in capsys.readouterr().err


@contextmanager
def full_disk(size):
    """No file can have more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_written_before(run, inputs, video, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(run, "good.png", video, "--output", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == {"good.png", "clip.mp4"}
    for what, size in (("good.png", 100), (video, 300)):
        with full_disk(size):
            assert call(run, what, "--output", out, "--score-threshold", 0) == 2
        assert f"{Path(what).name} cannot be written" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_not_one_image_can_be_read(run, inputs, capsys):
    assert call(run, "half.png", "--output", "out", "--json", "found.json") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("repr-det predict: error: Image half.png (")
    assert "cannot be read." in line
    assert not (inputs / "out").exists() and not (inputs / "found.json").exists()


def test_no_encoder_for_videos(run, video, tmp_path, monkeypatch, capsys):
    class Without:
        open = staticmethod(lambda *arguments: False)
        isOpened = staticmethod(lambda: False)  # noqa: N815
        release = staticmethod(lambda: None)

    monkeypatch.setattr(cv2, "VideoWriter", Without)
    monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *letters: 0, raising=False)
    assert call(run, video, "--output", tmp_path / "out") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("frames a second). Set --json instead of --output.")


def test_hidden_files_and_folders_are_left_alone(run, tmp_path):
    content = (run.images / "0.png").read_bytes()
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "deep/.x/b.png"):
        path = tmp_path / ".photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder = tmp_path / ".photos"
    assert [source.path for source in find_sources([folder])] == [folder / "a.png"]
    # Whoever names a hidden file means it.
    assert find_sources([folder / "._a.png"])[0].path == folder / "._a.png"


def test_a_very_thin_image_is_named_and_the_rest_written(run, tmp_path, capsys):
    photos, out, found = tmp_path / "photos", tmp_path / "drawn", tmp_path / "found.json"
    photos.mkdir()
    for name in ("a.png", "c.png"):
        (photos / name).write_bytes((run.images / "0.png").read_bytes())
    Image.new("RGB", (1, 1000)).save(photos / "b.png")
    Image.new("RGB", (100, 1)).save(photos / "d.png")  # one pixel is left of it
    options = ["--output", out, "--json", found, "--score-threshold", 0, "--batch-size", 3]
    assert call(run, photos, *options) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "1 could not be read: " in line and "b.png (it is too thin, 1 x 1000)" in line
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "c.png", "d.png"]
    files = {entry["file_name"] for entry in json.loads(found.read_text())}
    assert {str(photos / name) for name in ("a.png", "c.png")} <= files


@pytest.mark.parametrize(
    "fps", [1, 23.976, 29.97, 59.94, 65.535, 65.536, 119.881, 239.763, 655.351, 1000.5, 1e5]
)
def test_any_frame_rate_can_be_written(tmp_path, fps):
    path = str(tmp_path / "clip.mp4")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), writable_fps(fps), (64, 48))
    assert writer.isOpened()
    for _ in range(3):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    written = frames_of(path)[1]
    assert written == pytest.approx(min(fps, 65535), rel=2e-4)


def test_a_video_of_an_odd_frame_rate_is_drawn(run, tmp_path):
    source = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"MJPG"), 119.881, (64, 48))
    for _ in range(3):
        writer.write(np.full((48, 64, 3), 90, np.uint8))
    writer.release()
    assert frames_of(source)[1] == pytest.approx(119.881)
    assert call(run, source, "--output", tmp_path / "drawn") == 0
    assert frames_of(tmp_path / "drawn" / "clip.mp4")[1] == pytest.approx(119.88)
