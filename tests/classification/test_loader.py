from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from repr_det.classification.datasets import ImageArrays, ImageFiles, read_image_folder
from repr_det.classification.loader import (
    ArrayTestLoader,
    ArrayTrainLoader,
    FileTrainLoader,
    SampleOrder,
    Share,
    crop_and_flip,
    file_test_loader,
    train_transform,
)
from repr_det.engine.data import read_image
from tests.classification.settings import make_arrays
from tests.images import written_in_many_ways


@pytest.fixture
def arrays():
    return ImageArrays(*make_arrays(50, size=8), ("a", "b", "c", "d"))


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(13):
        folder = tmp_path / "ab"[index % 2]
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (30 + index, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return read_image_folder(tmp_path)


def same(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("image", "label"))


def test_an_epoch_shows_every_sample_once():
    order = SampleOrder(50, 8, seed=1)
    seen = torch.cat([order.batch(i) for i in range(25)])  # four epochs of 50
    for epoch in seen.view(4, 50):
        assert epoch.sort().values.tolist() == list(range(50))
    assert not torch.equal(seen[:50], seen[50:100])
    assert all(len(order.batch(i)) == 8 for i in range(25))


def test_order_depends_on_the_seed():
    assert not torch.equal(SampleOrder(50, 8, 1).batch(0), SampleOrder(50, 8, 2).batch(0))


def test_a_batch_larger_than_the_dataset_is_filled():
    assert SampleOrder(3, 8, 0).batch(0).bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_batches_continue_where_they_were_left(arrays, padding, flip):
    def loader():
        return ArrayTrainLoader(arrays, 8, seed=3, crop_padding=padding, flip=flip)

    whole = list(islice(loader(), 20))
    resumed = loader()
    resumed.set_iteration(11)
    assert all(same(a, b) for a, b in zip(whole[11:], islice(resumed, 9), strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_out_the_batch_of_one(arrays, world_size):
    def batches(share):
        return list(islice(ArrayTrainLoader(arrays, 8, 3, "cpu", 2, True, share), 10))

    alone = batches(Share())
    together = [batches(Share(rank, world_size)) for rank in range(world_size)]
    for iteration, batch in enumerate(alone):
        for key in batch:
            parts = torch.cat([shares[iteration][key] for shares in together])
            assert torch.equal(parts, batch[key])


def test_without_augmentation_images_are_the_originals(arrays):
    order = SampleOrder(50, 8, 3)
    for iteration, batch in enumerate(islice(ArrayTrainLoader(arrays, 8, 3), 10)):
        indices = order.batch(iteration)
        assert torch.equal(batch["image"], arrays.images[indices])
        assert torch.equal(batch["label"], arrays.labels[indices])


def test_bgr_turns_the_channels_round(arrays):
    rgb = next(iter(ArrayTrainLoader(arrays, 8, 3)))["image"]
    bgr = next(iter(ArrayTrainLoader(arrays, 8, 3, bgr=True)))["image"]
    assert torch.equal(bgr, rgb[:, [2, 1, 0]])


@pytest.mark.parametrize("flips", [None, torch.tensor([True, False, True, False, False])])
def test_crops_and_flips_image_by_image(flips):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 255, (5, 3, 6, 7), generator=generator, dtype=torch.uint8)
    offsets = torch.tensor([[0, 0], [4, 4], [2, 2], [1, 3], [4, 0]])
    out = crop_and_flip(images, 2, offsets, flips)
    for index, (top, left) in enumerate(offsets.tolist()):
        padded = np.pad(images[index].numpy(), ((0, 0), (2, 2), (2, 2)))
        expected = padded[:, top : top + 6, left : left + 7]
        if flips is not None and flips[index]:
            expected = expected[:, :, ::-1]
        assert np.array_equal(out[index].numpy(), expected)


def test_augmentation_uses_every_offset_and_half_of_the_flips():
    images = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
    images[0, :, 4, 3] = 255
    data = ImageArrays(images, torch.zeros(1, dtype=torch.int64), ("a",))
    places = []
    for batch in islice(ArrayTrainLoader(data, 10, 0, crop_padding=2, flip=True), 300):
        assert (batch["image"].amax(1).flatten(1).sum(1) == 255).all()
        places += [divmod(i, 9) for i in batch["image"][:, 0].flatten(1).argmax(1).tolist()]
    rows, columns = (torch.tensor(x).bincount(minlength=9) for x in zip(*places, strict=True))
    # The bright pixel of row 4 lands in rows 2 to 6; in columns 1 to 5, or mirrored 3 to 7.
    assert (rows[2:7] / 3000 - 0.2).abs().max() < 0.03
    expected = torch.tensor([0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.1, 0.1, 0])
    assert (columns / 3000 - expected).abs().max() < 0.03


@pytest.mark.parametrize("world_size", [1, 3])
def test_test_loader_shows_everything_once(arrays, world_size):
    loaders = [ArrayTestLoader(arrays, 7, "cpu", Share(r, world_size)) for r in range(world_size)]
    batches = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(b) for b in batches]
    images = torch.cat([batch["image"] for part in batches for batch in part])
    assert torch.equal(images, arrays.images)


def test_test_loader_of_a_process_without_images(arrays):
    loader = ArrayTestLoader(arrays.select(torch.tensor([4])), 7, "cpu", Share(0, 2))
    assert len(loader) == 0 and list(loader) == []


def file_batches(files, count, workers=0, start=0, share=None):
    transform = train_transform(16, 0.3, flip=True)
    loader = FileTrainLoader(files, 6, 1, transform, workers, share or Share())
    loader.set_iteration(start)
    return list(islice(loader, count))


def test_image_files_depend_on_neither_workers_nor_a_resume(files):
    torch.manual_seed(0)
    alone = file_batches(files, 6)
    torch.manual_seed(1)
    assert all(same(a, b) for a, b in zip(alone, file_batches(files, 6, workers=2), strict=True))
    assert all(same(a, b) for a, b in zip(alone[4:], file_batches(files, 2, start=4), strict=True))
    shares = [file_batches(files, 6, share=Share(rank, 2)) for rank in range(2)]
    for batch, first, second in zip(alone, *shares, strict=True):
        assert torch.equal(batch["image"], torch.cat([first["image"], second["image"]]))


def test_image_files_vary_from_epoch_to_epoch(files):
    one = files.select(torch.tensor([0]))
    images = file_batches(one, 1)[0]["image"]
    assert len({image.numpy().tobytes() for image in images}) == 6


def test_decoding_leaves_the_global_generator_alone(files):
    dataset = FileTrainLoader(files, 6, 1, train_transform(16, 0.3, flip=True)).dataset
    state = torch.get_rng_state()
    dataset[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_test_files_are_middle_crops(files):
    loader = file_test_loader(files, batch_size=5, image_size=14)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    labels = torch.cat([batch["label"] for batch in batches])
    assert torch.equal(labels, files.labels)
    assert batches[0]["image"].shape == (5, 3, 14, 14) and batches[0]["image"].dtype == torch.uint8


def coordinates(height, width):
    """An image whose red is the column of each pixel and whose green is its row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 200)], 2).astype(np.uint8)


def save(folder, *images):
    """Image files of one class."""
    (folder / "a").mkdir()
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / "a" / f"{index}.png")
    return read_image_folder(folder)


@pytest.mark.parametrize(
    ("size", "height", "width", "scale", "top", "left"),
    [
        # The shorter side becomes 8/7 of the crop, the longer one follows, and the middle remains.
        (70, 120, 240, 1.5, 5, 45),
        (70, 240, 120, 1.5, 45, 5),
        (70, 40, 50, 0.5, 5, 15),
        (112, 128, 128, 1.0, 8, 8),
        (224, 128, 160, 0.5, 16, 48),
    ],
)
def test_test_images_show_the_middle_of_what_was_resized(
    tmp_path, size, height, width, scale, top, left
):
    """Pixel centres lie half a pixel inside; a ramp stays one when it is resized."""
    data = save(tmp_path, coordinates(height, width))
    (batch,) = file_test_loader(data, 1, size)
    columns, rows, constant = batch["image"][0].float()
    x, y = ((torch.arange(size) + start + 0.5) * scale - 0.5 for start in (left, top))
    # Rounded to whole numbers once for each direction.
    assert (columns - x).abs().max() <= 1
    assert (rows - y[:, None]).abs().max() <= 1
    assert (constant == 200).all()


@pytest.mark.parametrize("flip", [False, True])
def test_training_crops_have_the_area_shape_and_mirroring_asked_for(tmp_path, flip):
    """Each crop is read off the slopes of a ramp, away from its edges."""
    side, size, count = 256, 32, 400
    data = save(tmp_path, coordinates(side, side))
    loader = FileTrainLoader(data, 40, 3, train_transform(size, 0.25, flip))
    images = torch.cat([batch["image"] for batch in islice(loader, count // 40)]).float()
    assert (images[:, 2] == 200).all()
    columns, rows = images[:, 0].mean(1), images[:, 1].mean(2)
    steps = size - 9
    across, down = ((line[:, -5] - line[:, 4]) / steps for line in (columns, rows))
    assert (down > 0).all()  # never upside down
    mirrored = across < 0
    # Of 400 draws, 4 standard deviations are 0.1.
    assert abs(mirrored.float().mean() - 0.5) < 0.1 if flip else not mirrored.any()
    width, height = across.abs() * size, down * size
    area, shape = width * height / side**2, width / height
    assert 0.24 < area.min() < 0.35 and 0.8 < area.max() < 1.01
    assert 0.73 < shape.min() < 0.8 and 1.25 < shape.max() < 1.37
    # Anywhere in the image: the middle of what is left over on either side is its middle.
    for line, length in ((columns, width), (rows, height)):
        begin = line.mean(1) - length / 2 + 0.5
        place = (begin / (side - length))[length < 0.8 * side]
        assert -0.05 < place.min() < 0.1 and 0.9 < place.max() < 1.05
        assert abs(place.mean() - 0.5) < 0.1


def test_images_are_seen_as_they_are_meant(tmp_path):
    """Grey, black and white, of a palette, transparent, or turned by EXIF."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    for path, seen in written_in_many_ways(tmp_path, pixels):
        assert np.array_equal(read_image(str(path)), seen), path.name


def test_damaged_image_is_named(tmp_path, files):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    data = ImageFiles((str(bad),), torch.tensor([0]), files.classes)
    with pytest.raises(ValueError, match=r"bad\.png cannot be read"):
        file_batches(data, 1)


@pytest.mark.parametrize("batch_size", [0, 7])
def test_batch_that_cannot_be_shared(arrays, batch_size):
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is"):
        ArrayTrainLoader(arrays, batch_size, 0, share=Share(0, 2))


def test_an_image_of_more_than_8_bits_is_refused(tmp_path):
    path = tmp_path / "x_ray.png"
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"x_ray.png has more than 8 bits a channel\. Convert it"):
        read_image(str(path))
