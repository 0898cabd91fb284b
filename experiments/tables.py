"""The paper's classification tables as data: what it reports, and which runs of ours answer it.

A row is a config with overrides; a table is its rows and which of them are standard training.
Accuracies and errors are top-1 on the test set in per cent. Where the paper shows a figure without
printing numbers, a row has no number of the paper.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from repr_det.errors import UserError

ACCURACY, ERROR, AP = "accuracy", "error", "AP"

Overrides = tuple[str | float | int | bool, ...]

STANDARD: Overrides = ("REPR.ENABLED", False)
HELD_OUT: Overrides = ("DATASETS.HELD_OUT", 5000)
"""The paper holds 5,000 training images out for its oracle; all runs on CIFAR do without them."""

CIFAR = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


@dataclass(frozen=True)
class Row:
    """One line of a table: a run for each seed.

    Attributes:
        name: names the row on the command line and its folder.
        label: what the table prints.
        paper: the number that the paper prints, or None.
        config: a config file.
        overrides: KEY, VALUE, KEY, VALUE ... merged into it.
        standard: name of the row of standard training that this row is compared with; None for
            such a row itself.
        teacher: name of the row whose network teaches this one, or None.
        teacher_seed: the seed of that network, counted from this one's.
    """

    name: str
    label: str
    paper: float | None
    config: str
    overrides: Overrides = ()
    standard: str | None = None
    teacher: str | None = None
    teacher_seed: int = 0


@dataclass(frozen=True)
class Table:
    """A table of the paper, or a figure of it as a table.

    Attributes:
        name: names the table on the command line and its folder.
        title: its heading.
        rows: in the order in which they are printed and run; teachers before their students.
        metric: what its numbers are: :data:`ACCURACY`, :data:`ERROR`, or :data:`AP` of detectors.
        notes: printed below the table, sentences.
        quick_images: training images of the shortened runs.
        correlates: every trained network's criteria are correlated with the greedy oracle, with
            the paper's correlations by criterion in ``paper_correlations``.
        paper_correlations: (of ranks, of values) by criterion.
        whole: the table that these rows were taken from, None where they are all.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    metric: str = ACCURACY
    notes: tuple[str, ...] = ()
    quick_images: int = 3000
    correlates: bool = False
    paper_correlations: dict[str, tuple[float, float]] = field(default_factory=dict)
    whole: Table | None = None

    def row(self, name: str) -> Row:
        """The row of a name.

        Raises:
            UserError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UserError(
            f"Table {self.name} has no row {name!r}: give one of "
            f"{', '.join(row.name for row in self.rows)}."
        )


def _pair(
    name: str,
    label: str,
    config: str,
    paper: tuple[float | None, float | None] = (None, None),
    overrides: Overrides = (),
) -> list[Row]:
    """Standard training and RePr of one setting."""
    standard = Row(f"{name}-standard", label, paper[0], config, overrides + STANDARD)
    method = Row(f"{name}-repr", f"{label}, RePr", paper[1], config, overrides, standard.name)
    return [standard, method]


def _study(variants: dict[str, tuple[str, Overrides]], common: Overrides) -> tuple[Row, ...]:
    """Standard training and variants of RePr on C^3(32); the paper shows them as a figure."""
    config = "cifar10_c3_32.yaml"
    standard = Row("standard", "Standard", None, config, common + STANDARD)
    return standard, *(
        Row(name, label, None, config, common + overrides, "standard")
        for name, (label, overrides) in variants.items()
    )


_NO_NORM = "C^3(32) is the variant without BatchNorm."
_OUR_TEACHER = (
    "The paper does not name its teacher; ours is the ResNet-20 of the first row, trained anew "
    "for each seed."
)


def _criteria() -> Table:
    names = ("Random", "Activations", "APoZ", "Gradients", "Taylor", "Hessian", "Weights", "Oracle")
    paper = dict(zip(names, (73.4, 74.1, 74.3, 74.3, 74.3, 74.4, 74.6, 76.0), strict=True))
    config = "cifar10_c3_32.yaml"
    return Table(
        "criteria",
        "Ranking criteria: C^3(32) on CIFAR-10, test accuracy in %",
        (
            Row("standard", "Standard", 72.1, "cifar10_c3_32_standard.yaml", HELD_OUT),
            *(
                Row(
                    label.lower(),
                    label,
                    number,
                    config,
                    (*HELD_OUT, "REPR.CRITERION", label.lower()),
                    "standard",
                )
                for label, number in paper.items()
            ),
            Row("ortho", "Ortho", 76.4, config, HELD_OUT, "standard"),
        ),
        notes=(
            _NO_NORM,
            "Ours that look at data (Activations to Hessian, Oracle) look at 512 training images.",
        ),
    )


def _orthogonality_loss() -> Table:
    paper = {"cifar10": (72.1, 72.8, 76.4, 76.7), "cifar100": (47.2, 48.3, 58.2, 58.6)}
    loss: Overrides = ("MODEL.CLASSIFIER.ORTHO_LOSS", 0.01)
    rows = []
    for data, (standard, with_loss, method, both) in paper.items():
        config = f"{data}_c3_32.yaml"
        for name, label, number, overrides in (
            ("standard", "Standard", standard, STANDARD),
            ("ol", "Standard + OL", with_loss, loss + STANDARD),
            ("repr", "RePr", method, ()),
            ("repr-ol", "RePr + OL", both, loss),
        ):
            rows.append(
                Row(
                    f"{data}-{name}",
                    f"{CIFAR[data]}: {label}",
                    number,
                    config,
                    HELD_OUT + overrides,
                    None if name == "standard" else f"{data}-standard",
                )
            )
    return Table(
        "orthogonality-loss",
        "Orthogonality loss (OL): C^3(32), test accuracy in %",
        tuple(rows),
        notes=(_NO_NORM,),
    )


def _distillation() -> Table:
    paper = {"cifar10": (72.1, 76.4, 74.8, 83.1), "cifar100": (47.2, 58.2, 56.5, 64.1)}
    taught: Overrides = ("DISTILL.TEACHER", "cifar_resnet20")
    rows = []
    for data, (standard, method, distilled, both) in paper.items():
        config = f"{data}_c3_32.yaml"
        teacher = Row(
            f"{data}-teacher",
            f"{CIFAR[data]}: teacher, ResNet-20",
            None,
            f"{data}_resnet20_standard.yaml",
            HELD_OUT,
        )
        rows.append(teacher)
        for name, label, number, overrides in (
            ("standard", "Standard", standard, STANDARD),
            ("repr", "RePr", method, ()),
            ("kd", "KD", distilled, taught + STANDARD),
            ("kd-repr", "KD + RePr", both, taught),
        ):
            rows.append(
                Row(
                    f"{data}-{name}",
                    f"{CIFAR[data]}: {label}",
                    number,
                    config,
                    HELD_OUT + overrides,
                    None if name == "standard" else f"{data}-standard",
                    teacher.name if "kd" in name else None,
                )
            )
    return Table(
        "distillation",
        "Knowledge distillation (KD): C^3(32), test accuracy in %",
        tuple(rows),
        notes=(_NO_NORM, _OUR_TEACHER),
        quick_images=2500,
    )


def _schemes() -> Table:
    standard = Row("standard", "Standard", 8.4, "cifar10_resnet20_standard.yaml", HELD_OUT)
    config = "cifar10_resnet20.yaml"
    return Table(
        "schemes",
        "Training schemes: ResNet-20 on CIFAR-10, test error in %",
        (
            standard,
            Row("dsd", "DSD", 7.8, "cifar10_resnet20_dsd.yaml", HELD_OUT, "standard"),
            Row(
                *("ban", "BAN", 8.2, "cifar10_resnet20_ban.yaml", HELD_OUT, "standard", "standard"),
                teacher_seed=1,
            ),
            Row(
                "repr-weights",
                "RePr, Weights",
                7.7,
                config,
                (*HELD_OUT, "REPR.CRITERION", "weights"),
                "standard",
            ),
            Row("repr-ortho", "RePr, Ortho", 6.9, config, HELD_OUT, "standard"),
        ),
        ERROR,
        notes=(
            "BAN is one generation, taught by the run of the first row with the next seed: with "
            "its own it would begin as its teacher began.",
        ),
        quick_images=2500,
    )


def _depth() -> Table:
    paper = {
        "cifar10": {3: (27.9, 23.6), 8: (26.8, 19.5), 13: (26.6, 20.6), 18: (28.2, 22.5)},
        "cifar100": {3: (52.8, 41.8), 8: (50.9, 36.8), 13: (51.0, 37.9), 18: (51.9, 39.5)},
    }
    rows = []
    for data, by_depth in paper.items():
        for depth, numbers in by_depth.items():
            rows += _pair(
                f"{data}-{depth}",
                f"{CIFAR[data]}: {depth} layers",
                f"{data}_c3_32.yaml",
                numbers,
                (*HELD_OUT, "MODEL.CLASSIFIER.NAME", f"c{depth}_32_bn"),
            )
    return Table(
        "depth",
        "Vanilla networks of n layers of 32 filters, test error in %",
        tuple(rows),
        ERROR,
        notes=("All with BatchNorm, the variant that the paper's parameter counts match.",),
    )


def _resnet() -> Table:
    paper = {
        "cifar10": {20: (8.4, 6.9), 32: (7.4, 6.1), 110: (6.3, 5.4), 182: (5.6, 5.1)},
        "cifar100": {20: (32.6, 31.1), 32: (31.4, 30.1), 110: (27.5, 26.4), 182: (26.0, 25.3)},
    }
    # He et al. 2016, section 4.2: 110 layers do not start at the full rate.
    warm_up: Overrides = (
        "SOLVER.WARMUP_EPOCHS", 1, "SOLVER.WARMUP_METHOD", "constant", "SOLVER.WARMUP_FACTOR", 0.1,
    )  # fmt: skip
    rows = []
    for data, by_depth in paper.items():
        for depth, numbers in by_depth.items():
            rows += _pair(
                f"{data}-{depth}",
                f"{CIFAR[data]}: ResNet-{depth}",
                f"{data}_resnet20.yaml",
                numbers,
                (
                    *HELD_OUT,
                    "MODEL.CLASSIFIER.NAME",
                    f"cifar_resnet{depth}",
                    *(warm_up if depth > 100 else ()),
                ),
            )
    return Table(
        "resnet", "ResNets, test error in %", tuple(rows), ERROR, quick_images=1000,
        notes=("Networks of more than 100 layers warm up for an epoch at a tenth of the rate.",),
    )  # fmt: skip


def _densenet() -> Table:
    paper = {
        "cifar10": {5: (39.4, 36.2), 40: (6.8, 6.2), 100: (5.3, 5.6)},
        "cifar100": {5: (43.5, 40.9), 40: (26.4, 25.2), 100: (22.2, 22.1)},
    }
    rows = []
    for data, by_depth in paper.items():
        for depth, numbers in by_depth.items():
            rows += _pair(
                f"{data}-{depth}",
                f"{CIFAR[data]}: DenseNet-{depth}",
                f"{data}_densenet40.yaml",
                numbers,
                (*HELD_OUT, "MODEL.CLASSIFIER.NAME", f"cifar_densenet{depth}"),
            )
    return Table(
        "densenet",
        "DenseNets (k = 12), test error in %",
        tuple(rows),
        ERROR,
        notes=("The paper does not describe its DenseNet of 5 layers; ours is one of our own.",),
        quick_images=1000,
    )


def _imagenet() -> Table:
    paper = {
        "resnet18": ("ResNet-18", 30.41, 28.68, 27.87, 27.31),
        "resnet34": ("ResNet-34", 27.50, 26.49, 26.06, 25.80),
        "resnet50": ("ResNet-50", 23.67, 22.79, 22.51, 22.37),
        "resnet101": ("ResNet-101", 22.40, 21.70, 21.51, 21.40),
        "resnet152": ("ResNet-152", 21.51, 20.99, 20.79, 20.71),
        "vgg16": ("VGG-16", 31.30, 27.76, 26.45, 25.50),
        "googlenet": ("Inception v1", 31.11, 29.41, 28.47, 28.01),
        "bn_inception": ("Inception v2", 27.60, 27.15, 26.95, 26.80),
    }
    rows = []
    for name, (label, standard, *by_cycles) in paper.items():
        config = f"imagenet_{name}.yaml"
        rows.append(Row(f"{name}-standard", label, standard, config, STANDARD))
        rows += [
            Row(
                f"{name}-n{cycles}",
                f"{label}, N = {cycles}",
                number,
                config,
                ("REPR.N", cycles),
                f"{name}-standard",
            )
            for cycles, number in enumerate(by_cycles, 1)
        ]
    return Table(
        "imagenet",
        "ImageNet, top-1 error in %",
        tuple(rows),
        ERROR,
        notes=("Each N is a run of its own; all are equally long.",),
        quick_images=2560,
    )


def _percent_pruned() -> Table:
    variants = {
        f"p{percent}": (
            f"p = {percent} %",
            ("REPR.PRUNE_RATIO", percent / 100, "REPR.MAX_LAYER_RATIO", 0.9),
        )
        for percent in (10, 20, 30, 40, 50, 60, 70)
    }
    return Table(
        "percent-pruned",
        "Share of dropped filters: C^3(32) on CIFAR-10, test accuracy in %",
        _study(variants, HELD_OUT),
        notes=(_NO_NORM, "A layer may lose up to 90 % of its filters in all of these runs."),
    )


def _cycles() -> Table:
    variants = {f"n{count}": (f"N = {count}", ("REPR.N", count)) for count in range(1, 7)}
    return Table(
        "cycles",
        "Number of cycles: C^3(32) on CIFAR-10, test accuracy in %",
        _study(variants, (*HELD_OUT, "SOLVER.MAX_EPOCHS", 200)),
        notes=(_NO_NORM, "All runs take 200 epochs, so that six cycles fit."),
    )


def _s1_s2() -> Table:
    variants = {
        f"s{epochs}": (f"S1 = S2 = {epochs}", ("REPR.S1", epochs, "REPR.S2", epochs))
        for epochs in (2, 5, 10, 15, 18)
    }
    return Table(
        "s1-s2",
        "Length of the phases in epochs: C^3(32) on CIFAR-10, test accuracy in %",
        _study(variants, (*HELD_OUT, "SOLVER.MAX_EPOCHS", 120)),
        notes=(
            _NO_NORM,
            "N = 3. All runs take 120 epochs, so that the longest cycles end before the last five.",
        ),
    )


def _pairs_by_config(variants: Sequence[tuple[str, str, str]]) -> tuple[Row, ...]:
    return tuple(
        row
        for name, label, config in variants
        for row in _pair(name, label, config, overrides=HELD_OUT)
    )


def _optimizers() -> Table:
    rows = _pairs_by_config(
        (
            ("sgd", "SGD", "cifar10_c3_32_sgd.yaml"),
            ("momentum", "SGD with momentum", "cifar10_c3_32.yaml"),
            ("adam", "Adam", "cifar10_c3_32_adam.yaml"),
            ("rmsprop", "RMSprop", "cifar10_c3_32_rmsprop.yaml"),
        )
    )
    title = "Optimizers: C^3(32) on CIFAR-10, test accuracy in %"
    return Table("optimizers", title, rows, notes=(_NO_NORM, "Rates are ours."))


def _lr_schedules() -> Table:
    rows = _pairs_by_config(
        (
            ("constant", "Constant", "cifar10_c3_32.yaml"),
            ("staircase", "Staircase", "cifar10_c3_32_staircase.yaml"),
            ("cyclical", "Cyclical", "cifar10_c3_32_cyclical.yaml"),
        )
    )
    title = "Learning-rate schedules: C^3(32) on CIFAR-10, test accuracy in %"
    return Table("lr-schedules", title, rows, notes=(_NO_NORM,))


def _dropout() -> Table:
    rows = _pairs_by_config(
        (
            ("none", "Without dropout", "cifar10_c3_32.yaml"),
            ("half", "Dropout 0.5", "cifar10_c3_32_dropout.yaml"),
        )
    )
    title = "Dropout before the linear layer: C^3(32) on CIFAR-10, test accuracy in %"
    return Table("dropout", title, rows, notes=(_NO_NORM,))


def _oracle_correlation() -> Table:
    return Table(
        "oracle-correlation",
        "Correlation of each criterion with the greedy oracle: trained C^3(32) on CIFAR-10",
        (Row("standard", "Standard", None, "cifar10_c3_32_standard.yaml", HELD_OUT),),
        notes=(
            _NO_NORM,
            "The oracle is the rise of the loss on 5,000 held-out training images when one filter "
            "is zeroed; the paper's is the accuracy lost. All criteria see the same images.",
            "The first layer is not ranked.",
        ),
        correlates=True,
        paper_correlations={"ortho_paper": (0.58, 0.38)},
    )


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        _criteria(),
        _orthogonality_loss(),
        _distillation(),
        _schemes(),
        _depth(),
        _resnet(),
        _densenet(),
        _imagenet(),
        _percent_pruned(),
        _cycles(),
        _s1_s2(),
        _optimizers(),
        _lr_schedules(),
        _dropout(),
        _oracle_correlation(),
    )
}


def only(table: Table, patterns: Sequence[str]) -> Table:
    """The table with some rows, and the rows that they are compared with or taught by.

    Args:
        table: a whole table.
        patterns: shell-style patterns of row names; empty for all.

    Raises:
        UserError: a pattern that matches no row.
    """
    if not patterns:
        return table
    names = [row.name for row in table.rows]
    wanted: set[str | None] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise UserError(
                f"Table {table.name} has no row {pattern!r}: give some of {', '.join(names)}."
            )
        wanted.update(found)
    # Backwards, because whatever a row needs stands before it.
    for row in reversed(table.rows):
        if row.name in wanted:
            wanted.update((row.standard, row.teacher))
    rows = tuple(row for row in table.rows if row.name in wanted)
    return replace(table, rows=rows, whole=table)
