"""The keys of the config are what README.md says of them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode

from repr_det import Reinit, RePr, RePrHook, RePrSchedule
from repr_det.method.compact import MODES
from repr_det.method.criteria import CRITERIA
from repr_det.tasks import get_cfg

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def flat(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    values = {}
    for key, value in node.items():
        nested = isinstance(value, CfgNode)
        values |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return values


def rows() -> list[tuple[list[str], list[str], str]]:
    """The table of keys: the keys of each row, what it says are their defaults, their meaning."""
    found = []
    section = README.split("\n## Keys\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        keys = re.findall(r"`([\w.]+)`", cells[0])
        if len(cells) != 3 or not keys:
            continue
        # `.SCALE` lies beside the key before it.
        full = [key if key[0] != "." else keys[0].rpartition(".")[0] + key for key in keys]
        defaults = cells[1].split(", ")
        found.append((full, defaults * len(keys) if len(defaults) == 1 else defaults, cells[2]))
    return found


def test_defaults_in_the_table_are_those_of_the_config():
    config = flat(get_cfg())
    table = {}
    for keys, defaults, _ in rows():
        table |= dict(zip(keys, defaults, strict=True))
    assert table == {key: str(config[key]) for key in table}


def test_the_table_has_every_key_of_repr():
    told = [key for keys, _, _ in rows() for key in keys]
    assert len(told) == len(set(told))
    assert {k for k in told if k.startswith("REPR.")} == {f"REPR.{k}" for k in flat(get_cfg().REPR)}


def test_the_table_has_every_choice():
    told = {keys[0]: set(re.findall(r"`(\w+)`", meaning)) for keys, _, meaning in rows()}
    assert told["REPR.CRITERION"] == set(CRITERIA)
    assert told["REPR.COMPACT"] == set(MODES)


@pytest.mark.parametrize("path", ["README.md", "benchmarks/README.md"])
def test_keys_that_are_spoken_of_exist(path):
    text = (ROOT / path).read_text()
    nodes = {key for full in flat(get_cfg()) for key in (full, full.rpartition(".")[0])}
    spoken = set(re.findall(r"\b[A-Z][A-Z_0-9]*(?:\.[A-Z][A-Z_0-9]*)+\b", text))
    assert {"REPR.S1", "REPR.COMPACT"} & spoken
    assert spoken <= nodes


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
        "EXCLUDE": ["b"], "MAX_LAYER_RATIO": 0.4, "COMPACT": "on", "WARMUP": 1, "SEED": 9,
        "REINIT.NORM": "previous", "REINIT.SCALE": 0.5, "REINIT.GAMMA": "one",
        "REINIT.BETA": "previous", "REINIT.OUTGOING": 1.0,
    }  # fmt: skip
    cfg = get_cfg()
    # "previous" excludes other values of the other keys, so it has a test of its own.
    assert set(other) == {*flat(cfg.REPR)} - {"ENABLED", "UNIT", "REINIT.DIRECTION"}
    assert all(value != flat(cfg.REPR)[key] for key, value in other.items())
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
