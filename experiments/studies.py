"""Our own questions as tables, in the form of the paper's.

Where RePr helps is searched for in the screening: one seed, few images, short runs, judged on
held-out training images. Only what wins there is repeated, over fresh seeds and on the test set.
Detectors are compared where there are many images and where there are few.
"""

from __future__ import annotations

from experiments.tables import AP, HELD_OUT, STANDARD, Overrides, Row, Table

_FEW: Overrides = (
    "DATASETS.HELD_OUT", 30000, "SOLVER.BASE_LR", 0.02, "SOLVER.WEIGHT_DECAY", 0.001,
)  # fmt: skip
"""C^3(32) on 20,000 images, where it overfits, with a rate and a weight decay that suit it."""
_SHORT: Overrides = (
    "SOLVER.MAX_EPOCHS", 40, "SOLVER.STEPS_EPOCHS", "(32, 37)", "REPR.S1", 6, "REPR.S2", 3,
    "DATASETS.TEST", "('cifar10_heldout',)", "TEST.EVAL_EPOCHS", 10,
)  # fmt: skip

_FIVE_CYCLES: Overrides = ("REPR.N", 5, "REPR.S1", 4, "REPR.S2", 2)
_BATCHNORM: Overrides = ("MODEL.CLASSIFIER.NAME", "c3_32_bn")
_RANDOM: Overrides = ("REPR.CRITERION", "random")


def _screened(name: str, label: str, *changed: str | float, standard: str | None = None) -> Row:
    overrides = _FEW + _SHORT + changed
    return Row(name, label, None, "cifar10_c3_32.yaml", overrides, standard)


def _variant(name: str, label: str, *changed: str | float) -> Row:
    return _screened(name, label, *changed, standard="standard")


def _with_standard(name: str, label: str, *changed: str | float) -> list[Row]:
    standard = _screened(f"{name}-standard", f"Standard, {label}", *changed, *STANDARD)
    return [
        standard,
        _screened(f"{name}-ortho", f"Ortho, {label}", *changed, standard=standard.name),
    ]


def screening() -> Table:
    """One choice at a time: ranking, return, share of filters, cycles, warm-up, decay, norms."""
    return Table(
        "screening",
        "Screening: C^3(32) on 20,000 images of CIFAR-10, accuracy on the other 30,000 in %",
        (
            _screened("standard", "Standard", *STANDARD),
            _variant("ortho", "Ortho: the defaults"),
            _variant("outgoing-1", "outgoing weights kept", "REPR.REINIT.OUTGOING", 1.0),
            _variant("outgoing-0.3", "outgoing weights x 0.3", "REPR.REINIT.OUTGOING", 0.3),
            _variant("random", "random ranking", *_RANDOM),
            _variant("cycles-5", "5 cycles of 4 + 2", *_FIVE_CYCLES),
            _variant("random-5", "random ranking, 5 cycles", *_RANDOM, *_FIVE_CYCLES),
            _variant("p-50", "p 50 %", "REPR.PRUNE_RATIO", 0.5, "REPR.MAX_LAYER_RATIO", 0.8),
            _variant("late", "3 cycles of 8 + 4", "REPR.S1", 8, "REPR.S2", 4),
            _variant("plain", "printed score", "REPR.CRITERION", "ortho_paper"),
            _variant("weights", "ranking by weights", "REPR.CRITERION", "weights"),
            _variant("norm-previous", "previous length", "REPR.REINIT.NORM", "previous"),
            _variant("scale-0.3", "length x 0.3", "REPR.REINIT.SCALE", 0.3),
            _variant("layer-34", "a layer loses 34 % at most", "REPR.MAX_LAYER_RATIO", 0.34),
            _variant(
                "layer-34-5", "34 % at most, 5 cycles", "REPR.MAX_LAYER_RATIO", 0.34, *_FIVE_CYCLES
            ),
            _variant("warmup", "rate warms up over an epoch", "REPR.WARMUP", 1),
            _variant(
                "warmup-kept",
                "the same, outgoing weights kept",
                *("REPR.WARMUP", 1, "REPR.REINIT.OUTGOING", 1.0),
            ),
            _variant("s2-long", "3 cycles of 5 + 5", "REPR.S1", 5, "REPR.S2", 5),
            *_with_standard("decay-0", "no weight decay", "SOLVER.WEIGHT_DECAY", 0.0),
            *_with_standard("bn", "BatchNorm", *_BATCHNORM),
            *(
                _screened(
                    f"bn-{name}-{value}",
                    f"BatchNorm, {name} of new filters: {value}",
                    *(*_BATCHNORM, f"REPR.REINIT.{name.upper()}", value),
                    standard="bn-standard",
                )
                for name, value in (("gamma", "one"), ("beta", "survivors"))
            ),
        ),
        notes=(
            "40 epochs, learning rate 0.02, a tenth of it from epoch 32 and again from 37, weight "
            "decay 0.001; S1 6, S2 3, N 3.",
            "One seed chooses nothing finer than about a point.",
        ),
    )


def _pair(config: str, overrides: Overrides, label: str = "RePr, Ortho") -> tuple[Row, Row]:
    """Standard training and RePr of one setting."""
    return (
        Row("standard", "Standard", None, config, overrides + STANDARD),
        Row("ortho", label, None, config, overrides, "standard"),
    )


def few_images() -> Table:
    """What the screening is about, at full length, over seeds and on the test set."""
    overrides: Overrides = (
        *_FEW,
        *("SOLVER.MAX_EPOCHS", 60, "SOLVER.STEPS_EPOCHS", "(48, 55)", "REPR.S1", 10, "REPR.S2", 5),
    )
    config = "cifar10_c3_32.yaml"
    return Table(
        "few-images",
        "C^3(32) on 20,000 images of CIFAR-10, test accuracy in %",
        (
            *_pair(config, overrides),
            Row("random", "RePr, random ranking", None, config, overrides + _RANDOM, "standard"),
        ),
        notes=(
            "60 epochs, learning rate 0.02, a tenth of it from epoch 48 and again from 55, weight "
            "decay 0.001; S1 10, S2 5, N 3.",
        ),
    )


def authors() -> Table:
    """The setting of the authors' public code, with three of its nine cycles."""
    overrides: Overrides = (
        *("REPR.N", 3, "SOLVER.MAX_EPOCHS", 139, "DATASETS.TEST", "('cifar10_test',)"),
    )
    return Table(
        "authors",
        "C^3(32) as the authors' public code trains it, cut to 3 cycles, test accuracy in %",
        _pair("cifar10_c3_32_authors.yaml", overrides, "RePr"),
        notes=("139 epochs: S1 20, S2 20, N 3, and the 19 epochs that follow the authors' last.",),
    )


def resnet20() -> Table:
    """ResNet-20 with BatchNorm and augmentation, its schedule shortened to a third."""
    overrides: Overrides = (
        *HELD_OUT,
        # As many iterations as there was a GPU for.
        *("SOLVER.MAX_EPOCHS", 0, "SOLVER.MAX_ITER", 17_600, "SOLVER.STEPS_EPOCHS", "(40,)"),
        *("REPR.S1", 8, "REPR.S2", 4),
    )
    return Table(
        "resnet20",
        "ResNet-20 on CIFAR-10, test accuracy in %",
        _pair("cifar10_resnet20.yaml", overrides),
        notes=(
            "50 epochs, a third of the config's 150: learning rate 0.1, a tenth of it from epoch "
            "40; S1 8, S2 4, N 3.",
        ),
    )


def _by_share(config: str, images: int, overrides: Overrides = ()) -> tuple[Row, ...]:
    """Standard training and RePr of a detector on all, a quarter and a tenth of the images."""
    rows = []
    for share in (1.0, 0.25, 0.1):
        common = (*overrides, "DATASETS.TRAIN_SHARE", share)
        label = f"{round(share * images):,} images"
        standard = Row(f"{share:g}-standard", label, None, config, common + STANDARD)
        method = Row(f"{share:g}-repr", f"{label}, RePr", None, config, common, standard.name)
        rows += [standard, method]
    return tuple(rows)


_EQUAL_LENGTH = "All runs are equally long, so fewer images are seen more often."


def neu_det() -> Table:
    """A small detector on real images, all of them and few."""
    config, share = "neu_det_faster_rcnn.yaml", 0.25
    random = (*_RANDOM, "DATASETS.TRAIN_SHARE", share)
    label, standard = "315 images, RePr with random ranking", f"{share:g}-standard"
    return Table(
        "neu-det",
        "NEU-DET: Faster R-CNN with a ResNet-18-FPN from scratch, AP on the 540 test images",
        (
            *_by_share(config, 1260),
            Row(f"{share:g}-random", label, None, config, random, standard),
        ),
        AP,
        notes=(_EQUAL_LENGTH,),
        quick_images=160,
    )


def shapes() -> Table:
    """The demo's detector on the built-in dataset, all of its images and few."""
    return Table(
        "shapes",
        "Built-in dataset: Faster R-CNN with a ResNet-18-FPN from scratch, AP on 150 images",
        # What a pair sees must not hang on how often its runs were stopped.
        _by_share("demo_faster_rcnn.yaml", 1000, ("DETERMINISTIC", True)),
        AP,
        notes=(
            _EQUAL_LENGTH,
            "The schedule is the demo's, tuned on the same 150 images.",
        ),
        quick_images=160,
    )


STUDIES: dict[str, Table] = {
    table.name: table
    for table in (screening(), few_images(), authors(), resnet20(), neu_det(), shapes())
}
