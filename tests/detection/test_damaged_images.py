"""Damaged images of every format: decoded, or named in one sentence, and skipped if that is set."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from repr_det.detection.mapper import NamedImages
from repr_det.detection.prediction import Labels, find_sources, predict
from repr_det.engine.data import image_fault, read_image
from repr_det.errors import UserError

FORMATS = {
    "avif": {},
    "bmp": {},
    "gif": {},
    "jfif": {"format": "JPEG", "quality": 90},
    "jpg": {"progressive": True},
    "pgm": {},
    "png": {},
    "ppm": {},
    "tif": {"compression": "tiff_lzw"},
    "tiff": {},
    "webp": {"lossless": True},
}
if not features.check("avif"):
    del FORMATS["avif"]


def encoded(suffix):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC)
    file, options = io.BytesIO(), FORMATS[suffix]
    image = image.convert("L") if suffix == "pgm" else image
    image.save(file, **{"format": Image.registered_extensions()[f".{suffix}"], **options})
    return file.getvalue()


ENCODED = {suffix: encoded(suffix) for suffix in FORMATS}


@st.composite
def mutations(draw):
    """A file of some format with one to three changes."""
    suffix = draw(st.sampled_from(sorted(FORMATS)))
    content = bytearray(ENCODED[suffix])
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            break
        # Headers decide more than pixels.
        end = draw(st.sampled_from([min(60, len(content)), len(content)]))
        at = draw(st.integers(0, end - 1))
        length = draw(st.integers(1, 8))
        match draw(st.sampled_from(["set", "cut", "remove", "insert", "zero", "repeat"])):
            case "set":
                new = draw(st.binary(min_size=length, max_size=length))
                content[at : at + length] = new
            case "cut":
                del content[at:]
            case "remove":
                del content[at : at + length]
            case "insert":
                content[at:at] = draw(st.binary(min_size=length, max_size=length))
            case "zero":
                content[at : at + length] = bytes(length)
            case "repeat":
                content[at:at] = content[at : at + 16 * length]
    return suffix, bytes(content)


def check_image(path):
    """The same answer in training, prediction and classification."""
    warnings.simplefilter("ignore")
    record = {"file_name": str(path), "height": 30, "width": 40}
    fault = image_fault(path)
    event("damaged" if fault else "decoded")

    def mapper(record):
        if fault := image_fault(record["file_name"]):
            raise IndexError(fault)  # as it comes from a decoder
        return record

    named, skipping = (NamedImages(mapper, skip=skip, longest=1333) for skip in (False, True))
    try:
        assert named(record) is record and not fault
    except UserError as error:
        sentence = str(error)
        assert "\n" not in sentence and str(path) in sentence
        if "more than 8 bits" not in sentence:
            assert skipping(record) is None and f"({fault})" in sentence or "too thin" in sentence
    try:
        read_image(str(path))
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)


common = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=300, derandomize=True, **common)
@given(mutations())
def test_mutated_images_are_decoded_or_named(tmp_path_factory, mutation):
    path = tmp_path_factory.getbasetemp() / f"mutated.{mutation[0]}"
    path.write_bytes(mutation[1])
    check_image(path)


@pytest.mark.slow
@settings(max_examples=2_000, **common)
@given(mutations())
def test_two_thousand_mutated_images(tmp_path_factory, mutation):
    path = tmp_path_factory.getbasetemp() / f"mutated.{mutation[0]}"
    path.write_bytes(mutation[1])
    check_image(path)


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_every_format_is_found_and_read(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    path.write_bytes(ENCODED[suffix])
    (source,) = find_sources([tmp_path])
    assert source.path == path and image_fault(path) is None
    seen = []

    def detector(images):
        seen.extend(images)
        raise RuntimeError("enough")

    detector.longest = None
    with pytest.raises(RuntimeError, match="enough"):
        predict(detector, Labels([], [], {}), [source])
    assert seen[0].shape == (30, 40, 3)


@pytest.mark.parametrize("empty", ["", "\n"])
def test_an_error_without_words_is_named_by_its_class(tmp_path, monkeypatch, caplog, empty):
    def silent(*arguments, **options):
        raise OverflowError(empty)

    (tmp_path / "1.png").touch()
    monkeypatch.setattr(Image, "open", silent)
    mapper = NamedImages(lambda record: record, skip=True)
    assert mapper({"file_name": str(tmp_path / "1.png")}) is None
    assert "1.png cannot be read (OverflowError)" in caplog.text
