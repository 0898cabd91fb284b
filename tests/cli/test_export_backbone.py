from __future__ import annotations

import re
import shlex

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model

from repr_det.classification import ImageClassifier, build_classifier
from repr_det.classification.export import backbone_settings, export_backbone
from repr_det.cli import main

MEAN, STD = [120.0, 115.0, 100.0], [60.0, 58.0, 56.0]


def make_classifier(name: str) -> ImageClassifier:
    """A classifier whose every weight and running statistic differs from its initial value."""
    torch.manual_seed(0)
    network = build_classifier(name, 3, image_size=64)
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.dim() == 1:
            tensor.data.uniform_(0.5, 1.5)
    return ImageClassifier(network=network, pixel_mean=MEAN, pixel_std=STD).eval()


def classifier_features(model: ImageClassifier, image: torch.Tensor) -> dict[str, torch.Tensor]:
    net = model.network
    x = net.maxpool(net.relu(net.bn1(net.conv1(model.preprocess_image({"image": image})))))
    features = {}
    for stage in range(1, 5):
        x = getattr(net, f"layer{stage}")(x)
        features[f"res{stage + 1}"] = x
    return features


def detector_cfg(settings: dict) -> object:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.merge_from_other_cfg(cfg.load_cfg(yaml.safe_dump(settings)))
    return cfg


@pytest.mark.parametrize(
    ("name", "target_format"),
    [("resnet18", "BGR"), ("resnet50", "RGB"), ("resnext50_32x4d", "RGB")],
)
def test_features_are_equal(tmp_path, name, target_format):
    model = make_classifier(name)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    target = tmp_path / "backbone.pth"
    settings = export_backbone(
        tmp_path / "model_final.pth", target, MEAN, STD, target_format=target_format
    )
    cfg = detector_cfg(settings)
    backbone = build_backbone(cfg).eval()
    missing = DetectionCheckpointer(backbone).load(cfg.MODEL.WEIGHTS)
    assert missing["__author__"] == "repr_det"
    rgb = torch.randint(0, 256, (1, 3, 64, 64)).float()
    pixels = rgb if cfg.INPUT.FORMAT == "RGB" else rgb.flip(1)
    mean, std = (
        torch.tensor(v).view(-1, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    with torch.no_grad():
        expected = classifier_features(model, rgb)
        found = backbone((pixels - mean) / std)
    assert found.keys() == expected.keys()
    for stage in expected:
        scale = expected[stage].abs().max()
        assert scale > 0
        assert (found[stage] - expected[stage]).abs().max() <= 1e-5 * scale


def test_a_whole_detector_takes_every_backbone_weight(tmp_path):
    model = make_classifier("resnet50")
    torch.save(model.network.state_dict(), tmp_path / "plain.pth")
    settings = export_backbone(tmp_path / "plain.pth", tmp_path / "backbone.pth", MEAN, STD)
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_other_cfg(cfg.load_cfg(yaml.safe_dump(settings)))
    detector = build_model(cfg)
    DetectionCheckpointer(detector).load(cfg.MODEL.WEIGHTS)
    state = detector.state_dict()
    network = model.network.state_dict()
    pairs = {
        "backbone.bottom_up.stem.conv1.weight": "conv1.weight",
        "backbone.bottom_up.stem.conv1.norm.running_mean": "bn1.running_mean",
        "backbone.bottom_up.res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "backbone.bottom_up.res2.0.shortcut.norm.bias": "layer1.0.downsample.1.bias",
        "backbone.bottom_up.res4.5.conv2.norm.running_var": "layer3.5.bn2.running_var",
        "backbone.bottom_up.res5.2.conv3.weight": "layer4.2.conv3.weight",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(state[ours], network[theirs])
    known = {tuple(v.flatten()[:8].tolist()) for v in network.values() if v.dim()}
    for key, value in state.items():
        if key.startswith("backbone.bottom_up."):
            assert tuple(value.flatten()[:8].tolist()) in known, key


def test_command_line_reads_the_config_beside_the_checkpoint(tmp_path, capsys):
    model = make_classifier("resnet18")
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    config = {"MODEL": {"PIXEL_MEAN": MEAN, "PIXEL_STD": STD}, "INPUT": {"FORMAT": "RGB"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    target = str(tmp_path / "b.pth")
    assert main(["export-backbone", str(tmp_path), "-o", target, "--format", "BGR"]) == 0
    written = yaml.safe_load((tmp_path / "b.yaml").read_text())
    assert written["MODEL"]["PIXEL_MEAN"] == MEAN[::-1]
    assert written["INPUT"]["FORMAT"] == "BGR"
    assert written["MODEL"]["RESNETS"] == {
        "DEPTH": 18,
        "STRIDE_IN_1X1": False,
        "RES2_OUT_CHANNELS": 64,
    }
    # What is printed can be pasted after a training command.
    pairs = shlex.split(capsys.readouterr().out.splitlines()[-1])
    cfg = get_cfg()
    cfg.merge_from_list(pairs)
    assert cfg.MODEL.RESNETS.DEPTH == 18 and MEAN[::-1] == cfg.MODEL.PIXEL_MEAN
    torch.load(tmp_path / "b.pth", weights_only=True)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("none.pth", "b.pth", "does not exist"),
        ("text.pth", "b.pth", "is damaged or is no checkpoint"),
        ("other.pth", "b.pth", "holds no ResNet"),
        ("other.pth", "b.pkl", "must end in .pth"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, source, target, words):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert main(["export-backbone", str(tmp_path / source), "-o", str(tmp_path / target)]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert re.search(words, told) and not (tmp_path / target).exists()


def test_what_is_not_of_this_command_is_not_replaced(tmp_path, capsys):
    source, target = tmp_path / "r18.pth", tmp_path / "b.pth"
    torch.save(make_classifier("resnet18").network.state_dict(), source)
    before = source.read_bytes()
    assert main(["export-backbone", str(source), "-o", str(source)]) == 2
    assert (
        "r18.pth is a file that this command also reads" in capsys.readouterr().err
        and source.read_bytes() == before
    )
    for content in ("MODEL: {WEIGHTS: mine.pth}\nINPUT: {FORMAT: RGB}\n", "words", "MODEL: [1"):
        (tmp_path / "b.yaml").write_text(content)
        assert main(["export-backbone", str(source), "-o", str(target)]) == 2
        assert "b.yaml, which is another file" in capsys.readouterr().err
        assert (tmp_path / "b.yaml").read_text() == content and not target.exists()
    (tmp_path / "b.yaml").unlink()
    for _ in range(2):  # its own is replaced
        assert main(["export-backbone", str(source), "-o", str(target)]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"Config .*mine\.yaml does not exist. Set"),
        ("MODEL: {PIXEL_MEAN: [1, 2, 3]}\nINPUT: {FORMAT: RGB}\n", "does not hold MODEL.PIXEL"),
        ("just words\n", "does not hold MODEL.PIXEL"),
        ("MODEL: [1\n", "does not hold MODEL.PIXEL"),
    ],
)
def test_a_config_without_the_input_settings_is_refused(tmp_path, capsys, content, words):
    source, config = tmp_path / "model_final.pth", tmp_path / "mine.yaml"
    torch.save({"model": make_classifier("resnet18").state_dict()}, source)
    if content is not None:
        config.write_text(content)
    command = ["export-backbone", str(source), "-o", str(tmp_path / "b.pth")]
    assert main([*command, "--config-file", str(config)]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert re.search(words, told) and not (tmp_path / "b.pth").exists()


def test_stages_that_detectron2_does_not_know():
    from torchvision.models.resnet import BasicBlock, ResNet

    with pytest.raises(ValueError, match=r"\[1, 1, 1, 2\]"):
        backbone_settings(ResNet(BasicBlock, [1, 1, 1, 2]).state_dict())
