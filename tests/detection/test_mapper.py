"""Images of a loader that cannot be read."""

from __future__ import annotations

import itertools
import struct

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetMapper
from PIL import Image, PngImagePlugin

from repr_det.detection.mapper import NamedImages
from repr_det.errors import UserError
from repr_det.tasks import get_cfg
from tests.images import written_in_many_ways


@pytest.fixture
def cfg():
    return get_cfg()


class TestUnreadableImages:
    @pytest.fixture(params=["missing", "truncated", "text", "other size", "huge"])
    def record(self, request, tmp_path, monkeypatch):
        path = tmp_path / "photo.jpg"
        if request.param != "missing":
            cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (60, 80, 3)))
        if request.param == "truncated":
            path.write_bytes(path.read_bytes()[:500])
        if request.param == "text":
            path.write_text("not an image")
        if request.param == "huge":  # Pillow refuses twice as many pixels as this
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
        size = (60, 81) if request.param == "other size" else (60, 80)
        return {"file_name": str(path), "height": size[0], "width": size[1], "annotations": []}

    def test_a_bad_image_is_named(self, cfg, record):
        mapper = NamedImages(DatasetMapper(cfg, is_train=True), skip=False)
        with pytest.raises(ValueError, match=r"Image .*photo.jpg cannot be read .*SKIP_BAD_IMAGES"):
            mapper(record)

    def test_a_bad_image_is_skipped_and_counted(self, cfg, record, caplog):
        mapper = NamedImages(DatasetMapper(cfg, is_train=True), skip=True)
        assert mapper(dict(record)) is None
        assert mapper(dict(record)) is None
        assert mapper({**record, "file_name": "another.jpg"}) is None
        assert "process: 2." in caplog.text and "process: 3." not in caplog.text

    def test_not_all_images_are_skipped(self, cfg, record):
        mapper = NamedImages(DatasetMapper(cfg, is_train=True), skip=True, images=2)
        assert mapper(dict(record)) is None and mapper(dict(record)) is None
        with pytest.raises(UserError, match="None of the training images can be read"):
            mapper({**record, "file_name": "another.jpg"})


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_images_are_seen_as_they_are_meant(cfg, tmp_path, order):
    """Grey, of a palette, transparent, or turned by EXIF; the annotations have the upright size."""
    cfg.INPUT.FORMAT = order
    cfg.INPUT.MIN_SIZE_TEST = 30  # as they are
    mapper = NamedImages(DatasetMapper(cfg, is_train=False), skip=False)
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    for path, seen in written_in_many_ways(tmp_path, pixels):
        image = mapper({"file_name": str(path), "height": 30, "width": 40})["image"]
        channels = seen if order == "RGB" else seen[:, :, ::-1]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), channels), path.name


@pytest.mark.parametrize(
    ("suffix", "channels", "kind"),
    [*itertools.product(["png", "tiff"], [1, 3, 4], [np.uint16]), ("tiff", 1, np.float32)],
)
def test_an_image_of_more_than_8_bits_is_named(tmp_path, suffix, channels, kind):
    """Pillow would make it white, or take the higher half of 16 bits."""
    path = tmp_path / f"x_ray.{suffix}"
    ramp = np.linspace(0, 60_000, 64 * channels).reshape(8, 8, channels)
    assert cv2.imwrite(str(path), ramp.astype(kind))
    mapper = NamedImages(lambda record: record, skip=True)
    with pytest.raises(ValueError, match=r"x_ray\..* has more than 8 bits a channel\. Convert it"):
        mapper({"file_name": str(path)})


def test_colours_of_a_ppm_may_have_16_bits(tmp_path):
    mapper = NamedImages(lambda record: record, skip=True)
    for maxval, size in ((255, 1), (1023, 2), (65535, 2)):
        path = tmp_path / f"{maxval}.ppm"
        path.write_bytes(f"P6 2 2 {maxval}\n".encode() + bytes(2 * 2 * 3 * size))
        if maxval == 255:
            assert mapper({"file_name": str(path)}) is not None
            continue
        with pytest.raises(UserError, match="more than 8 bits a channel"):
            mapper({"file_name": str(path)})


def test_an_image_of_16_bits_for_three_channels_is_read(tmp_path):
    """A BMP with five or six bits a channel."""
    size, pixels = 14 + 40 + 12, np.arange(4, dtype="<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    start = b"BM" + struct.pack("<IHHI", size + len(pixels), 0, 0, size)
    (tmp_path / "small.bmp").write_bytes(start + header + masks + pixels)
    record = {"file_name": str(tmp_path / "small.bmp")}
    assert NamedImages(lambda record: record, skip=False)(record) is record


def test_a_png_with_a_long_text_is_named_and_skipped(cfg, tmp_path):
    path, info = tmp_path / "photo.png", PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (40, 30)).save(path, pnginfo=info)
    record = {"file_name": str(path), "height": 30, "width": 40, "annotations": []}
    with pytest.raises(UserError, match=r"photo\.png cannot be read \(Decompressed"):
        NamedImages(DatasetMapper(cfg, is_train=True), skip=False)(dict(record))
    assert NamedImages(DatasetMapper(cfg, is_train=True), skip=True)(dict(record)) is None


def test_an_extremely_thin_image_is_named_and_skipped(cfg, tmp_path):
    path = tmp_path / "thin.png"
    Image.new("RGB", (1, 3000)).save(path)
    record = {"file_name": str(path), "height": 3000, "width": 1, "annotations": []}
    mapper = DatasetMapper(cfg, is_train=True)
    with pytest.raises(UserError, match=r"thin\.png cannot be read \(it is too thin, 1 x 3000\)"):
        NamedImages(mapper, skip=False, longest=1333)(dict(record))
    assert NamedImages(mapper, skip=True, longest=1333)(dict(record)) is None
    # The limit is where Detectron2's resizing leaves no pixel.
    for longest, fits in ((1499, False), (1500, True)):
        cfg.INPUT.MAX_SIZE_TEST = longest
        image = NamedImages(DatasetMapper(cfg, is_train=False), skip=True, longest=longest)(record)
        assert (image is not None) == fits


def test_an_error_of_the_mapper_itself_keeps_its_traceback(tmp_path):
    path = tmp_path / "sound.png"
    Image.new("RGB", (4, 4)).save(path)

    def mapper(record):
        raise ValueError("my own code")

    for skip in (False, True):
        with pytest.raises(ValueError, match="my own code") as error:
            NamedImages(mapper, skip=skip)({"file_name": str(path)})
        assert not isinstance(error.value, UserError)
