from __future__ import annotations

import functools
import json
from itertools import islice

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.engine.hooks import CallbackHook
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from repr_det.classification import ClassificationTrainer
from repr_det.classification.datasets import use_image_folder
from repr_det.classification.loader import SampleOrder
from repr_det.errors import UserError
from repr_det.method.compact import Compact, Speed
from tests.classification.settings import make_arrays, register, register_corners, small_cfg


@pytest.fixture
def cfg(tmp_path):
    register_corners()
    return small_cfg(str(tmp_path))


def run(cfg, resume=False):
    trainer = ClassificationTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def test_learns_evaluates_and_records(cfg, tmp_path):
    cfg.SOLVER.MAX_ITER = 40
    cfg.TEST.EVAL_PERIOD = 20
    torch.manual_seed(0)
    trainer = run(cfg)
    accuracy = trainer._last_eval_results["accuracy"]
    assert accuracy["top1"] > 90 and accuracy["top5"] == 100
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    by_iteration = {line["iteration"]: line for line in lines if "accuracy/top1" in line}
    assert sorted(by_iteration) == [19, 40]
    assert by_iteration[40]["accuracy/top1"] == accuracy["top1"]
    assert any("total_loss" in line for line in lines)


def test_a_new_run_ignores_the_folders_checkpoints(cfg, tmp_path):
    run(cfg)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    trainer = ClassificationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    stop = HookBase()
    stop.after_step = functools.partial(pytest.fail, "as if it were killed")
    trainer.register_hooks([stop])
    with pytest.raises(pytest.fail.Exception):
        trainer.train()
    again = ClassificationTrainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 0


def test_what_is_trained_on_is_the_order_of_the_seed(cfg):
    cfg.SEED = 9
    loader = ClassificationTrainer.build_train_loader(cfg)
    data = DatasetCatalog.get("corners_train")
    batch = next(iter(loader))
    expected = [data[i]["label"] for i in SampleOrder(120, 20, 9).batch(0).tolist()]
    assert batch["label"].tolist() == expected


def epoch_of_labels(cfg, start=0):
    """The label of every training image, by its pixels, as an epoch of batches shows them."""
    loader = ClassificationTrainer.build_train_loader(cfg)
    loader.set_iteration(start)
    batches = islice(loader, 6)
    pairs = [zip(b["image"], b["label"].tolist(), strict=True) for b in batches]
    return {image.numpy().tobytes(): label for pair in pairs for image, label in pair}


def test_an_image_keeps_its_random_label(cfg):
    clean = epoch_of_labels(cfg)
    cfg.DATASETS.RANDOM_LABELS = 0.5
    labels = epoch_of_labels(cfg)
    assert len(labels) == 120
    # 60 labels are drawn, of which one in four is the true one.
    assert 30 <= sum(labels[image] != clean[image] for image in labels) <= 55
    assert epoch_of_labels(cfg, start=600) == labels
    cfg.SEED += 1
    assert epoch_of_labels(cfg) == labels
    cfg.DATASETS.RANDOM_LABELS_SEED += 1
    assert epoch_of_labels(cfg) != labels


def test_evaluation_has_no_random_labels(cfg):
    cfg.DATASETS.HELD_OUT = 30
    cfg.DATASETS.TEST = ("corners_heldout", "corners_test", "corners_train")
    clean = [list(ClassificationTrainer.build_test_loader(cfg, n)) for n in cfg.DATASETS.TEST]
    cfg.DATASETS.RANDOM_LABELS = 1.0
    ClassificationTrainer.check_to_train(cfg)
    for name, batches in zip(cfg.DATASETS.TEST, clean, strict=True):
        found = list(ClassificationTrainer.build_test_loader(cfg, name))
        assert [b["label"].tolist() for b in found] == [b["label"].tolist() for b in batches]


@pytest.mark.parametrize("key, value", [("", 1.5), ("", -0.1), ("", float("nan")), ("_SEED", -1)])
def test_random_labels_out_of_range(cfg, key, value, tmp_path):
    cfg.DATASETS[f"RANDOM_LABELS{key}"] = value
    with pytest.raises(UserError, match=rf"^DATASETS.RANDOM_LABELS{key} is {value}. Set [^.]*"):
        ClassificationTrainer(cfg)
    assert not list(tmp_path.iterdir())


def write_folder(folder, image, count=6):
    """An image folder of four classes."""
    for label in "abcd":
        (folder / label).mkdir(parents=True)
        for index in range(count):
            image.save(folder / label / f"{index}.png")
    return str(folder)


@pytest.mark.parametrize("kind", ["arrays", "files"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_channels_arrive_in_the_order_of_the_means(cfg, tmp_path, kind, order):
    """A colour that is the mean, in the order of INPUT.FORMAT, is zero to the network."""
    colour = {"R": 250, "G": 120, "B": 7}
    cfg.INPUT.FORMAT = order
    cfg.MODEL.PIXEL_MEAN = [float(colour[channel]) for channel in order]
    cfg.MODEL.PIXEL_STD = [1.0, 2.0, 3.0]
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.DATALOADER.NUM_WORKERS = 0
    for split in ("train", "test"):
        if kind == "arrays":
            images = torch.tensor(list(colour.values()), dtype=torch.uint8).view(1, 3, 1, 1)
            images = images.expand(40, 3, 16, 16)
            register(f"corners_{split}", images, torch.arange(40) % 4, list("abcd"))
        else:
            image = Image.new("RGB", (30, 20), tuple(colour.values()))
            folder = write_folder(tmp_path / split, image)
            use_image_folder(cfg, split.upper(), f"{split}_of_{tmp_path.name}", folder)
    model = build_model(cfg)
    training = next(iter(ClassificationTrainer.build_train_loader(cfg)))
    testing = next(iter(ClassificationTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    for batch in (training, testing):
        assert len(batch["image"]) >= 20
        assert not model.preprocess_image(batch).any()


def test_random_crops_of_the_config_have_every_offset(cfg):
    """A white image shows where its black border begins."""
    cfg.INPUT.CROP_PADDING = 4
    register("corners_train", torch.full((4, 3, 16, 16), 255).byte(), torch.arange(4), list("abcd"))
    loader = ClassificationTrainer.build_train_loader(cfg)
    white = torch.cat([batch["image"] for batch in islice(loader, 50)])
    black = white.amax(1) == 0
    offsets = []
    for rows, columns in zip(black.all(2), black.all(1), strict=True):
        place = []
        for line in (rows, columns):
            before = int((~line).nonzero()[0])
            behind = len(line) - 1 - int((~line).nonzero()[-1])
            assert min(before, behind) == 0
            place.append(behind - before)
        offsets.append(tuple(place))
    assert len(offsets) == 1000
    assert set(offsets) == {(y, x) for y in range(-4, 5) for x in range(-4, 5)}


def test_image_folders_are_cropped_and_mirrored_as_the_config_says(cfg, tmp_path):
    """A picture that is dark on its left, whole where the smallest share of its area is all."""
    picture = Image.new("RGB", (40, 40))
    picture.paste((255, 255, 255), (20, 0, 40, 40))
    name = f"halves_{tmp_path.name}"
    use_image_folder(cfg, "TRAIN", name, write_folder(tmp_path / "halves", picture))
    cfg.DATASETS.TEST = (name,)
    cfg.INPUT.CROP_MIN_AREA = 1.0
    cfg.DATALOADER.NUM_WORKERS = 0

    def on_the_left(loader):
        """How bright the left half of each image of ten batches is, from 0 to 1."""
        images = torch.cat([batch["image"] for batch in islice(loader, 10)])
        assert images.shape[1:] == (3, 16, 16)
        return images[..., :8].float().mean((1, 2, 3)) / 255

    light = on_the_left(ClassificationTrainer.build_train_loader(cfg))
    assert len(light) == 200 and light.max() < 0.1
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    light = on_the_left(ClassificationTrainer.build_train_loader(cfg))
    assert ((light < 0.1) | (light > 0.9)).all()
    # Of 200 draws, 4 standard deviations are 0.14.
    assert abs((light > 0.9).float().mean() - 0.5) < 0.14
    light = on_the_left(ClassificationTrainer.build_test_loader(cfg, name))
    assert len(light) == 24 and light.max() < 0.1
    cfg.INPUT.CROP_MIN_AREA = 0.1
    light = on_the_left(ClassificationTrainer.build_train_loader(cfg))
    assert ((light > 0.1) & (light < 0.9)).any()


def test_held_out_images_are_not_trained_on(cfg):
    cfg.DATASETS.HELD_OUT = 20
    cfg.DATASETS.TEST = ("corners_heldout", "corners_test")
    cfg.SOLVER.MAX_EPOCHS = 2
    trainer = run(cfg)
    assert trainer.max_iter == 10  # two epochs of 100 images
    assert len(trainer.data_loader.labels) == 100
    assert set(trainer._last_eval_results) == {"corners_heldout", "corners_test"}
    trained = trainer.data_loader.images.flatten(1).tolist()
    held_out = ClassificationTrainer.build_test_loader(trainer.cfg, "corners_heldout")
    assert not any(image in trained for image in held_out.images.flatten(1).tolist())


@pytest.mark.parametrize("stop", [5, 9, 13, 18])
def test_a_resumed_run_ends_with_the_same_bits(cfg, tmp_path, stop):
    """Stopped in S1, S2, the second cycle and the tail: data, phases and weights go on."""
    cfg.MODEL.CLASSIFIER.NAME = "c3_8_bn"
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.INPUT.CROP_PADDING = 2
    cfg.SOLVER.MAX_ITER = 22
    cfg.REPR.ENABLED = True
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 6, 4, 2
    torch.manual_seed(0)
    cfg.OUTPUT_DIR = str(tmp_path / "whole")
    whole = run(cfg)

    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    torch.manual_seed(0)
    stopped = ClassificationTrainer(cfg)
    stopped.resume_or_load(False)
    with pytest.raises(KeyboardInterrupt):
        interrupt_after(stopped, stop)
    torch.manual_seed(1)
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == stop
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_resumed_run_on_image_files_ends_with_the_same_bits(cfg, tmp_path):
    """Dropout draws from the generator that a new loader's worker seeds would advance."""
    cfg.MODEL.CLASSIFIER.DROPOUT = 0.5
    name = f"dropped_{tmp_path.name}"
    use_image_folder(
        cfg, "TRAIN", name, write_folder(tmp_path / "data", Image.new("RGB", (40, 40)))
    )
    cfg.DATASETS.TEST = ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DETERMINISTIC = True
    cfg.OUTPUT_DIR = str(tmp_path / "whole")
    torch.manual_seed(0)
    whole = run(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    torch.manual_seed(0)
    stopped = ClassificationTrainer(cfg)
    with pytest.raises(KeyboardInterrupt):
        interrupt_after(stopped, 5)
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == 5
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


@pytest.mark.parametrize("option", ["MODEL.CHANNELS_LAST", "MODEL.COMPILE", "SOLVER.FUSED"])
def test_ways_to_be_faster_train_alike(cfg, option, monkeypatch):
    """Through a drop and a return; the network is compiled without a compiler's code."""
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(
        nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend)
    )
    cfg.MODEL.CLASSIFIER.NAME = "c3_8_bn"
    cfg.REPR.ENABLED = True
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N, cfg.REPR.COMPACT = 4, 4, 1, "off"
    trained = []
    for value in (False, True):
        cfg.merge_from_list([option, value])
        torch.manual_seed(0)
        trained.append(run(cfg).model.state_dict())
    for name, value in trained[0].items():
        assert torch.allclose(value.float(), trained[1][name].float(), atol=1e-4), name
    is_last = trained[1]["network.features.4.weight"].is_contiguous(
        memory_format=torch.channels_last
    )
    assert is_last == (option == "MODEL.CHANNELS_LAST")
    assert bool(compiled) == (option == "MODEL.COMPILE")


@pytest.mark.parametrize(
    ("mode", "ratio", "smaller"),
    [("on", 0.5, True), ("off", 2.0, False), ("auto", 2.0, True), ("auto", 0.5, False)],
)
def test_compact_by_config(cfg, monkeypatch, mode, ratio, smaller):
    """In S2 there are fewer parameters, or as many; what is measured counts for auto alone."""
    monkeypatch.setattr("repr_det.engine.hook.MEASURING_PAYS_FROM", 1)
    monkeypatch.setattr(Compact, "speedup", lambda self: Speed(ratio, ratio, 0.0))
    cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST = 5, ()
    cfg.REPR.ENABLED = True
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N, cfg.REPR.COMPACT = 2, 2, 1, mode
    trainer = ClassificationTrainer(cfg)
    sizes = []
    count = CallbackHook(
        after_step=lambda t: sizes.append(sum(p.numel() for p in t.model.parameters()))
    )
    trainer.register_hooks([count])
    trainer.train()
    full = sizes[0]
    assert [size < full for size in sizes] == [False, False, smaller, smaller, False]
    assert max(sizes) == full


@pytest.mark.parametrize("excluded", ["network.features.3", "network.features.6"])
def test_layers_excluded_by_config_lose_no_filter(cfg, tmp_path, excluded):
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.DATASETS.TEST = 3, 1, ()
    cfg.REPR.ENABLED = True
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N, cfg.REPR.EXCLUDE = 1, 1, 1, [excluded]
    trainer = run(cfg)
    weights = torch.load(tmp_path / "model_0000001.pth", weights_only=True)["model"]
    convs = [n for n, m in trainer.model.named_modules() if isinstance(m, nn.Conv2d)]
    losing = {n for n in convs if (weights[f"{n}.weight"].flatten(1) == 0).all(1).any()}
    assert excluded in convs[1:]
    assert losing == set(convs[1:]) - {excluded}


def test_mixed_precision_through_a_drop_and_a_return(cfg, tmp_path):
    """As by hand, and resumed in S2 as if never stopped."""
    cfg.DETERMINISTIC = cfg.SOLVER.AMP.ENABLED = cfg.REPR.ENABLED = True
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 4, 4, 1
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 12, 0
    torch.manual_seed(0)
    whole = run(cfg).model.state_dict()
    torch.manual_seed(0)
    trainer = ClassificationTrainer(cfg)
    method = trainer._repr_hook.method
    for iteration in range(12):
        method.step(iteration)
        batch = next(trainer._trainer._data_loader_iter)
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(trainer.model(batch).values())
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        trainer.scheduler.step()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, whole[name]), name
    torch.manual_seed(0)
    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        interrupt_after(ClassificationTrainer(cfg), 6)
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == 6
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole[name]), name


def interrupt_after(trainer, iteration):
    """Train so many iterations, write a checkpoint, and stop as Ctrl-C would."""

    class Interrupt(HookBase):
        def after_step(self):
            if self.trainer.iter + 1 == iteration:
                self.trainer.checkpointer.save("stopped", iteration=self.trainer.iter)
                raise KeyboardInterrupt

    trainer.register_hooks([Interrupt()])
    trainer.train()


def test_dense_sparse_dense_by_config(cfg, tmp_path):
    cfg.DSD.ENABLED = True
    cfg.DSD.DENSE_ITERS = 2
    cfg.DSD.SPARSE_ITERS = 9
    cfg.DSD.SPARSITY = 0.5
    cfg.SOLVER.CHECKPOINT_PERIOD = 11
    after = run(cfg).model.network.fc.weight
    state = torch.load(tmp_path / "model_0000010.pth", weights_only=True)
    before = state["model"]["network.fc.weight"]
    assert (before == 0).sum() == before.numel() // 2
    assert (after == 0).sum() < after.numel() // 4


def test_dense_sparse_dense_that_does_not_fit(cfg, tmp_path):
    cfg.DSD.ENABLED = True
    cfg.SOLVER.MAX_EPOCHS, cfg.DSD.DENSE_EPOCHS, cfg.DSD.SPARSE_EPOCHS = 8, 6, 3
    with pytest.raises(ValueError, match=r"36 \+ 18 = 54 .* ends after 48\. .*DSD.DENSE_ITERS"):
        ClassificationTrainer(cfg)


def test_dense_sparse_dense_with_repr(cfg):
    cfg.DSD.ENABLED = cfg.REPR.ENABLED = True
    with pytest.raises(ValueError, match=r"DSD.ENABLED and REPR.ENABLED .* Set one of them to F"):
        ClassificationTrainer.check_to_train(cfg)


@pytest.mark.parametrize("flip", ["vertical", "Horizontal"])
def test_flip_that_classification_does_not_have(cfg, flip):
    cfg.INPUT.RANDOM_FLIP = flip
    with pytest.raises(ValueError, match=f"INPUT.RANDOM_FLIP is '{flip}'. Set none or horizontal"):
        ClassificationTrainer(cfg)


@pytest.mark.parametrize(
    ("key", "value", "least"), [("INPUT.CROP_PADDING", -1, 0), ("TEST.IMS_PER_BATCH", 0, 1)]
)
def test_settings_that_no_batch_can_be_made_with(cfg, key, value, least):
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=f"{key} is {value}. Set {least} or more"):
        ClassificationTrainer(cfg)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("INPUT.CROP_MIN_AREA", 2.0, "INPUT.CROP_MIN_AREA is 2.0. Set a share above 0, 1 at most"),
        ("INPUT.CROP_MIN_AREA", 0.0, "INPUT.CROP_MIN_AREA is 0.0"),
        ("INPUT.FORMAT", "XYZ", "INPUT.FORMAT is 'XYZ'. Set RGB or BGR"),
    ],
)
def test_settings_that_are_no_share_or_no_order_of_channels(cfg, key, value, told):
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=told):
        ClassificationTrainer(cfg)


def test_test_set_with_other_classes(cfg):
    register("corners_test", *make_arrays(50), ["a", "b", "d", "c"])
    with pytest.raises(ValueError, match="corners_test has other classes than corners_train"):
        ClassificationTrainer(cfg)


def test_missing_data_stops_the_trainer_before_anything_is_built(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg.DATASETS.TRAIN = ("imagenet_train",)
    with pytest.raises(UserError, match="imagenet.*DETECTRON2_DATASETS"):
        ClassificationTrainer(cfg)
