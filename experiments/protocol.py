"""The studies ``finetune`` and ``noise``: which runs there are, in which order, and what is chosen.

PROTOCOL.md says the same in words. Nothing here trains: everything is a function of the values
that are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

from experiments.tables import Overrides

CHOICE, TEST = "choice", "test"
STANDARD = "standard"

CHOICE_SEED = 0
TEN_SEEDS = tuple(range(1, 11))
THREE_SEEDS = TEN_SEEDS[:3]

_OFF = {"REPR.ENABLED": False}
_PREVIOUS = {"REPR.REINIT.DIRECTION": "previous"}


def _cycles(cycles: int, s1: int, s2: int) -> Overrides:
    return {"REPR.ENABLED": True, "REPR.N": cycles, "REPR.S1": s1, "REPR.S2": s2}


@dataclass(frozen=True)
class Setting:
    """What the arms of a study have in common, and its arms.

    Attributes:
        overrides: values by dotted key of the study's config.
        arms: overrides of each arm, standard training first.
    """

    overrides: Overrides
    arms: dict[str, Overrides]


@dataclass(frozen=True)
class Study:
    """One question.

    Attributes:
        config: the config file.
        overrides: values by dotted key of the config, in every run.
        settings: by name; the first one has the primary contrast.
        key: the config key whose value every arm chooses for itself.
        grid: the values to choose from.
        seed_keys: keys that are set to the seed, in addition to ``SEED`` and ``REPR.SEED``.
        datasets: what is evaluated on, by stage.
        metric: in an evaluation of a record, in %.
        diverged: counted for a run whose loss became infinite or NaN.
    """

    config: str
    overrides: Overrides
    settings: dict[str, Setting]
    key: str
    grid: tuple[float, ...]
    seed_keys: tuple[str, ...]
    datasets: dict[str, str]
    metric: str
    diverged: float


def _finetune(share: float, steps: int, long: tuple[int, int], short: int) -> Setting:
    """For a share of the images and a number of steps.

    ``long`` is S1 and S2 of three cycles; ``short`` is S1, and also S2, of seven.
    """
    drops = (round(0.8 * steps), round(0.9333 * steps))
    default = _cycles(3, *long)
    heads = ["backbone.fpn_*", "proposal_generator.rpn_head.conv", "roi_heads.box_head.conv*"]
    return Setting(
        {
            "DATASETS.TRAIN_SHARE": share,
            "SOLVER.MAX_ITER": steps,
            "SOLVER.STEPS": drops,
            "TEST.EVAL_PERIOD": 0,
        },
        {
            STANDARD: _OFF,
            "repr": default,
            "repr-heads": default | {"REPR.INCLUDE": heads},
            "previous-3": default | _PREVIOUS,
            "previous-7": _cycles(7, short, short) | _PREVIOUS,
        },
    )


def _noise(share: float) -> Setting:
    default = _cycles(3, 6, 3)
    return Setting(
        {"DATASETS.RANDOM_LABELS": share},
        {
            STANDARD: _OFF,
            "repr": default,
            "repr-50": default | {"REPR.PRUNE_RATIO": 0.5, "REPR.MAX_LAYER_RATIO": 0.8},
            "previous": default | _PREVIOUS,
        },
    )


STUDIES = {
    "finetune": Study(
        config="neu_det_faster_rcnn.yaml",
        overrides={
            "MODEL.BACKBONE.NAME": "build_efficientnet_lite_fpn_backbone",
            # Of the images that the pretrained weights were trained on.
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [127.0, 127.0, 127.0],
            "MODEL.PIXEL_STD": [128.0, 128.0, 128.0],
            "INPUT.MIN_SIZE_TRAIN": (160,),
            "INPUT.MAX_SIZE_TRAIN": 160,
            "INPUT.MIN_SIZE_TEST": 160,
            "INPUT.MAX_SIZE_TEST": 160,
            # Those of the config, for 160 pixels in place of 96.
            "MODEL.ANCHOR_GENERATOR.SIZES": [[25, 40], [60, 90], [125, 163]],
            # 504 of 1,260 training images are left, of which a half or a quarter is trained on.
            "DATASETS.HELD_OUT": 756,
        },
        settings={
            "252-600": _finetune(0.5, 600, (100, 50), 33),
            "126-900": _finetune(0.25, 900, (150, 75), 50),
            "252-1800": _finetune(0.5, 1800, (300, 150), 100),
        },
        key="SOLVER.BASE_LR",
        grid=(0.0005, 0.001, 0.002),
        seed_keys=(),
        datasets={CHOICE: "neu_det_heldout", TEST: "neu_det_test"},
        metric="AP",
        diverged=0.0,
    ),
    "noise": Study(
        config="cifar10_c3_32.yaml",
        overrides={
            "DATASETS.HELD_OUT": 30000,
            "SOLVER.BASE_LR": 0.02,
            "SOLVER.MAX_EPOCHS": 40,
            "SOLVER.STEPS_EPOCHS": (32, 37),
            "SOLVER.CHECKPOINT_EPOCHS": 2,
            "TEST.EVAL_EPOCHS": 10,
            "DETERMINISTIC": True,
        },
        settings={"40": _noise(0.4), "0": _noise(0.0)},
        key="SOLVER.WEIGHT_DECAY",
        grid=(0.001, 0.003, 0.005, 0.01, 0.02),
        seed_keys=("DATASETS.RANDOM_LABELS_SEED",),
        datasets={CHOICE: "cifar10_heldout", TEST: "cifar10_test"},
        metric="top1",
        diverged=10.0,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        study: name.
        stage: :data:`CHOICE` or :data:`TEST`.
        setting: name.
        arm: name.
        value: of the study's key.
        seed: of the run.
    """

    study: str
    stage: str
    setting: str
    arm: str
    value: float
    seed: int = CHOICE_SEED

    @property
    def row(self) -> str:
        """The name of all runs that differ from this one in the seed alone."""
        return f"{self.setting}-{self.arm}-{self.value:g}"

    def __str__(self) -> str:
        return f"{self.study}-{self.stage} {self.row} seed {self.seed}"

    @property
    def overrides(self) -> Overrides:
        """Of the study's config, the seed's own keys apart."""
        study = STUDIES[self.study]
        setting = study.settings[self.setting]
        return {
            **study.overrides,
            **setting.overrides,
            **setting.arms[self.arm],
            **dict.fromkeys(study.seed_keys, self.seed),
            "DATASETS.TEST": (study.datasets[self.stage],),
            study.key: self.value,
        }


Values = Mapping[Cell, float | None]
"""What is recorded: the value after the last step by run, None for one that failed."""


def choice_cells(study: str, setting: str) -> list[Cell]:
    """The runs that choose: every arm at every value of the grid, at one seed."""
    arms, grid = STUDIES[study].settings[setting].arms, STUDIES[study].grid
    return [Cell(study, CHOICE, setting, arm, value) for value in grid for arm in arms]


def chosen(study: str, setting: str, values: Values) -> dict[str, Cell] | None:
    """The run of each arm that has the highest value on the held-out images.

    Of equal ones the first of the grid. A failed run is not chosen, and an arm of which all failed
    is not among the result.

    Returns:
        By arm, in the order of the arms; None while a run is not recorded.
    """
    cells = choice_cells(study, setting)
    if any(cell not in values for cell in cells):
        return None
    best: dict[str, Cell] = {}
    for arm in STUDIES[study].settings[setting].arms:
        found = [(values[c], c) for c in cells if c.arm == arm and values[c] is not None]
        if found:
            best[arm] = max(found, key=lambda pair: pair[0])[1]
    return best


def best_repr(best: Mapping[str, Cell], values: Values) -> str | None:
    """The arm that is compared with standard training: of all others the best, the first of equals.

    Args:
        best: from :func:`chosen`.
        values: the same.
    """
    arms = [arm for arm in best if arm != STANDARD]
    return max(arms, key=lambda arm: values[best[arm]], default=None)


def cells_on_test_set(study: str, setting: str, values: Values, part: str) -> list[Cell]:
    """The runs on the test set that the recorded choices ask for; none before all are recorded.

    Args:
        study: name.
        setting: name.
        values: what is recorded.
        part: ``"primary"``: standard training and the best arm, over ten seeds; ``"grid"``: the
            same at all other values; ``"others"``: the other arms over three seeds, and of a
            setting without a primary contrast all arms.
    """
    best = chosen(study, setting, values)
    if not best:
        return []
    is_primary = setting == next(iter(STUDIES[study].settings))
    pair = [arm for arm in (STANDARD, best_repr(best, values)) if arm in best] if is_primary else []
    found = [replace(best[arm], stage=TEST) for arm in best if (arm in pair) != (part == "others")]
    if part == "grid":
        grid = STUDIES[study].grid
        found = [replace(c, value=value) for value in grid for c in found if value != c.value]
    seeds = THREE_SEEDS if part == "others" else TEN_SEEDS
    return [replace(cell, seed=seed) for seed in seeds for cell in found]


def _alternately(*lists: list[Cell]) -> Iterator[Cell]:
    for cells in zip_longest(*lists):
        yield from (cell for cell in cells if cell is not None)


def all_cells(values: Values) -> list[Cell]:
    """Every run of the protocol that is known by now, in the order in which they are done.

    The settings of the primary contrasts come first. In each setting the choice comes before the
    test set.
    """

    def test(study: str, setting: str, part: str) -> list[Cell]:
        return cells_on_test_set(study, setting, values, part)

    return [
        *_alternately(choice_cells("finetune", "252-600"), choice_cells("noise", "40")),
        *_alternately(test("finetune", "252-600", "primary"), test("noise", "40", "primary")),
        *_alternately(choice_cells("finetune", "126-900"), choice_cells("noise", "0")),
        *_alternately(test("finetune", "252-600", "others"), test("noise", "40", "others")),
        *_alternately(test("finetune", "126-900", "others"), test("noise", "0", "others")),
        *_alternately(choice_cells("finetune", "252-1800"), test("noise", "40", "grid")),
        *test("finetune", "252-1800", "others"),
    ]


def next_cell(values: Values, tries: Callable[[Cell], int]) -> Cell | None:
    """What to run next: the first that is not recorded, those that failed once after all others.

    Args:
        values: what is recorded; None for runs that failed too often to be tried again.
        tries: how often a run has failed.
    """
    missing = [cell for cell in all_cells(values) if cell not in values]
    return min(missing, key=tries, default=None)
