"""What a run or a config says of a trained model."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from repr_det.engine.checkpoint import SafeCheckpointer
from repr_det.engine.config import get_cfg
from repr_det.engine.trained import load_trained, merge_trained
from repr_det.errors import UserError
from tests.detectors import shrink


@pytest.fixture
def run(tmp_path):
    """A run of another machine, without its checkpoint itself."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "xpu"
    cfg.MODEL.WEIGHTS = "where/it/began.pkl"
    cfg.INPUT.MIN_SIZE_TEST = 123
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    return tmp_path


def test_a_run_is_its_config_and_last_checkpoint_on_this_machine(run):
    cfg = get_cfg()
    device = cfg.MODEL.DEVICE
    merge_trained(cfg, run, None, ["INPUT.MAX_SIZE_TEST", "456"])
    assert str(run / "model_0000009.pth") == cfg.MODEL.WEIGHTS
    assert device == cfg.MODEL.DEVICE
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (123, 456)


def test_overrides_win(run):
    cfg = get_cfg()
    merge_trained(cfg, run, None, ["MODEL.WEIGHTS", "other.pth", "MODEL.DEVICE", "meta"])
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE) == ("other.pth", "meta")


def test_a_run_may_have_keys_of_its_own(run):
    """Those that a user's trainer adds; a mistake on the command line is still one."""
    with (run / "config.yaml").open("a") as file:
        file.write("MY: {KEY: 3}\n")
    cfg = get_cfg()
    merge_trained(cfg, run, None, [])
    assert cfg.MY.KEY == 3
    with pytest.raises(UserError, match="NO_KEY"):
        merge_trained(get_cfg(), run, None, ["SOLVER.NO_KEY", "1"])


@pytest.mark.parametrize("name", ["config.yaml", "last_checkpoint"])
def test_no_run(run, name):
    (run / name).unlink()
    with pytest.raises(UserError, match="holds no run"):
        merge_trained(get_cfg(), run, None, [])


def test_the_config_of_a_run_executes_no_code(run, tmp_path):
    mark = tmp_path / "executed"
    (run / "config.yaml").write_text(f'SEED: !!python/object/apply:os.mkdir ["{mark}"]\n')
    with pytest.raises(ValueError, match=r"config.yaml cannot be read \("):
        merge_trained(get_cfg(), run, None, [])
    assert not mark.exists()


@pytest.mark.parametrize("content", ["", "- a list", "text", "a: [1", "a: b: c"])
def test_configs_that_are_none(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad.yaml cannot be read \(.*\). Correct it") as error:
        merge_trained(get_cfg(), None, str(path), [])
    assert "\n" not in str(error.value)


def test_weights_must_be_whole(tmp_path):
    """Of another number of classes, a detector would go on with random heads."""
    cfg = shrink(get_cfg(), tmp_path)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    model = build_model(cfg)
    SafeCheckpointer(model, str(tmp_path)).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    loaded = load_trained(cfg)
    assert not loaded.training
    saved = model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in loaded.state_dict().items())
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(ValueError, match="is of another architecture"):
        load_trained(cfg)
