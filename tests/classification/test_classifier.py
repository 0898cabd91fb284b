from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from repr_det.classification import ImageClassifier, build_classifier
from tests.classification.settings import make_arrays, small_cfg


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(small_cfg())


@pytest.fixture
def batch():
    images, labels = make_arrays(6)
    return {"image": images, "label": labels}


def as_dicts(batch):
    return [
        {"image": image, "label": int(label), "height": 16, "width": 16}
        for image, label in zip(batch["image"], batch["label"], strict=True)
    ]


def test_both_formats_give_the_same(model, batch):
    assert torch.equal(model(batch)["loss_cls"], model(as_dicts(batch))["loss_cls"])
    model.eval()
    logits = model(batch)
    assert logits.shape == (6, 4)
    assert torch.equal(logits, model(as_dicts(batch)))
    assert torch.equal(logits, model(batch["image"]))
    alone = model([{"image": batch["image"][2]}])
    assert torch.allclose(alone[0], logits[2], atol=1e-6)


def test_loss_is_cross_entropy_of_normalised_images(model, batch):
    images = (batch["image"].double().float() - 100) / 50
    expected = F.cross_entropy(model.network(images), batch["label"])
    losses = model(batch)
    assert list(losses) == ["loss_cls"]
    assert torch.allclose(losses["loss_cls"], expected)


def test_accuracy_of_the_training_batch_is_recorded(model, batch):
    with EventStorage() as storage:
        model(batch)
    logits = model.eval()(batch)
    right = sum(int(row.argmax()) == batch["label"][i] for i, row in enumerate(logits))
    assert storage.latest()["train/top1"][0] == pytest.approx(100 * right / 6)


def test_checkpoint_holds_the_network_only(model):
    assert all(name.startswith("network.") for name in model.state_dict())
    assert not hasattr(model, "backbone")


def test_auxiliary_outputs_add_weighted_losses(batch):
    cfg = small_cfg()
    cfg.INPUT.IMAGE_SIZE = 32
    torch.manual_seed(0)
    network = build_classifier("googlenet", 4)
    model = ImageClassifier(
        network=network,
        pixel_mean=[100.0] * 3,
        pixel_std=[50.0] * 3,
        aux_weight=0.25,
        label_weight=0.5,
    )
    images = make_arrays(4, size=32)[0]
    labels = torch.tensor([0, 1, 2, 3])
    torch.manual_seed(1)
    losses = model({"image": images, "label": labels})
    torch.manual_seed(1)
    outputs = copy.deepcopy(network)((images.float() - 100) / 50)
    assert set(losses) == {"loss_cls", "loss_aux0", "loss_aux1"}
    for name, logits, weight in (
        ("loss_cls", outputs.logits, 0.5),
        ("loss_aux0", outputs.aux_logits2, 0.125),
        ("loss_aux1", outputs.aux_logits1, 0.125),
    ):
        assert torch.allclose(losses[name], weight * F.cross_entropy(logits, labels))
    assert model.eval()({"image": images}).shape == (4, 4)


def test_channels_last_changes_the_order_of_memory_only(model, batch):
    cfg = small_cfg()
    cfg.MODEL.CHANNELS_LAST = True
    other = build_model(cfg)
    other.load_state_dict(model.state_dict())
    images = other.preprocess_image(batch)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, model.preprocess_image(batch))
    for m in (model, other):
        m(batch)["loss_cls"].backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert b.is_contiguous() and torch.allclose(a.grad, b.grad, atol=1e-6)


def test_images_without_labels_in_training(model, batch):
    with pytest.raises(ValueError, match="without labels"):
        model(batch["image"])


def test_images_of_different_sizes_in_a_batch(model):
    images = [{"image": torch.zeros(3, 16, 16)}, {"image": torch.zeros(3, 16, 20)}]
    with pytest.raises(ValueError, match="different shapes"):
        model.eval()(images)


def test_mistakes_in_the_config_come_when_it_is_built():
    cfg = small_cfg()
    cfg.MODEL.CLASSIFIER.NAME = "resnet20"
    with pytest.raises(ValueError, match="Did you mean"):
        build_model(cfg)
    cfg.MODEL.CLASSIFIER.NAME = "inception_v3"
    with pytest.raises(ValueError, match="16 x 16"):
        build_model(cfg)
