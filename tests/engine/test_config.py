"""The keys of the config, what the documentation says of them, and what they do."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg as get_detectron2_cfg

from repr_det import Reinit, RePr, RePrHook, RePrSchedule
from repr_det.engine.config import config_path, flat_settings
from repr_det.errors import UserError
from repr_det.method.compact import MODES
from repr_det.method.criteria import CRITERIA
from repr_det.tasks import get_cfg

ROOT = Path(__file__).parents[2]
DOCS = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]


@pytest.fixture(scope="module")
def documented() -> dict[str, str]:
    """The comment of every key that the page of the documentation lists."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = [function for group in module.SECTIONS.values() for function in group]
    return {key: text for add in functions for key, text in module.keys_of(add).items()}


def test_every_key_that_is_added_is_documented(documented):
    assert set(documented) == set(flat_settings(get_cfg())) - set(
        flat_settings(get_detectron2_cfg())
    )
    assert all(text.endswith(".") for text in documented.values())


def test_every_choice_is_documented(documented):
    for key, names in (("REPR.CRITERION", CRITERIA), ("REPR.COMPACT", MODES)):
        assert set(names) <= set(re.findall(r"\w+", documented[key])), key


@pytest.mark.parametrize("path", ["README.md", *DOCS])
def test_keys_that_documents_name_exist(path):
    text = (ROOT / path).read_text()
    nodes = {key for full in flat_settings(get_cfg()) for key in (full, full.rpartition(".")[0])}
    named = set(re.findall(r"\b[A-Z][A-Z_0-9]*(?:\.[A-Z][A-Z_0-9]*)+\b", text))
    assert named <= nodes


def test_a_hook_by_config_is_one_by_default():
    """So that what is said of a key holds for the argument, too."""
    cfg = get_cfg()
    cfg.REPR.ENABLED, cfg.REPR.S1, cfg.REPR.S2 = True, 2, 1
    hook = RePrHook.from_config(cfg)
    assert hook.schedule == RePrSchedule(2, 1, 3)
    assert hook._mode == RePrHook(hook.schedule)._mode == "auto"
    defaults = {n: p.default for n, p in inspect.signature(RePr).parameters.items()}
    for name, value in hook._arguments.items():
        assert value == {**defaults, "reinit": Reinit(), "include": [], "exclude": []}[name], name


def test_every_key_of_repr_reaches_the_hook():
    other = {
        "S1": 4, "S2": 3, "N": 2, "PRUNE_RATIO": 0.2, "CRITERION": "weights", "INCLUDE": ["a"],
        "EXCLUDE": ["b"], "MAX_LAYER_RATIO": 0.4, "COMPACT": "on", "LINEAR": True, "WARMUP": 1,
        "SEED": 9, "REINIT.NORM": "previous", "REINIT.SCALE": 0.5, "REINIT.GAMMA": "one",
        "REINIT.BETA": "previous", "REINIT.OUTGOING": 1.0,
    }  # fmt: skip
    cfg = get_cfg()
    # "previous" excludes other values of the other keys, so it has a test of its own.
    assert set(other) == {*flat_settings(cfg.REPR)} - {"ENABLED", "UNIT", "REINIT.DIRECTION"}
    assert all(value != flat_settings(cfg.REPR)[key] for key, value in other.items())
    cfg.merge_from_list([part for k, v in other.items() for part in (f"REPR.{k}", v)])
    assert RePrHook.from_config(cfg) is None
    cfg.REPR.ENABLED = True
    hook = RePrHook.from_config(cfg)
    assert hook.schedule == RePrSchedule(s1=4, s2=3, cycles=2)
    assert hook._mode == "on"
    assert hook._arguments == {
        "prune_ratio": 0.2,
        "criterion": "weights",
        "include": ["a"],
        "exclude": ["b"],
        "linear": True,
        "max_layer_ratio": 0.4,
        "warmup": 1,
        "seed": 9,
        "reinit": Reinit("orthogonal", "previous", 0.5, "one", "previous", 1.0),
    }


def test_direction_reaches_the_hook():
    cfg = get_cfg()
    cfg.REPR.ENABLED, cfg.REPR.S1, cfg.REPR.S2 = True, 2, 1
    cfg.REPR.REINIT.DIRECTION = "previous"
    assert RePrHook.from_config(cfg)._arguments["reinit"] == Reinit(direction="previous")


def test_a_config_of_standard_training_that_is_gone_says_what_is_the_same():
    with pytest.raises(UserError, match="Set repr_faster_rcnn.yaml and REPR.ENABLED False"):
        config_path("repr_faster_rcnn_standard.yaml")
