"""Config keys for classification."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_classification_config(cfg: CfgNode) -> None:
    """Add the keys that only classification reads to a Detectron2 config, in place.

    Keys in epochs replace their counterparts in iterations where they are not zero; see
    :func:`repr_det.classification.epochs.resolve_epochs`.
    """
    cfg.MODEL.CLASSIFIER = CfgNode()
    # Name of the network, see repr_det.classification.models.classifier_names.
    cfg.MODEL.CLASSIFIER.NAME = "c3_32"
    # Number of classes. With --train-folder it is the number of folders.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 10
    # Probability of dropout before the last linear layer.
    cfg.MODEL.CLASSIFIER.DROPOUT = 0.0
    # Weight of the loss of each auxiliary output (GoogLeNet, Inception v3), as in their papers.
    cfg.MODEL.CLASSIFIER.AUX_WEIGHT = 0.3

    # Side of the square input images in pixels.
    cfg.INPUT.IMAGE_SIZE = 32
    # CIFAR in training: a random crop after this many zero pixels on every side; 0 for none.
    cfg.INPUT.CROP_PADDING = 0
    # Image folders in training: smallest share of the image's area in a random crop.
    cfg.INPUT.CROP_MIN_AREA = 0.08

    # Share of the training images whose labels are replaced by random ones, for studies of wrong
    # labels. A random label is drawn from all classes alike, so that one in NUM_CLASSES is the true
    # one. Held-out and test labels stay as they are.
    cfg.DATASETS.RANDOM_LABELS = 0.0
    # Which images get random labels, and which ones: the same for every run with this seed,
    # whatever SEED is. With one seed, a larger share contains the smaller ones.
    cfg.DATASETS.RANDOM_LABELS_SEED = 0

    # Images in a test batch, per process.
    cfg.TEST.IMS_PER_BATCH = 500
    # Epochs between evaluations, instead of TEST.EVAL_PERIOD. Rounded up to whole iterations, so
    # that evaluations come after the end of an epoch where the batch does not divide the images.
    cfg.TEST.EVAL_EPOCHS = 0

    # Length of training in epochs, instead of SOLVER.MAX_ITER.
    cfg.SOLVER.MAX_EPOCHS = 0
    # Epochs after which the learning rate drops, instead of SOLVER.STEPS.
    cfg.SOLVER.STEPS_EPOCHS = ()
    # Epochs of warm-up, instead of SOLVER.WARMUP_ITERS.
    cfg.SOLVER.WARMUP_EPOCHS = 0
    # Epochs between checkpoints, instead of SOLVER.CHECKPOINT_PERIOD.
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0
    # Epochs in a period of the cyclical learning rate, instead of SOLVER.CYCLE_ITERS.
    cfg.SOLVER.CYCLE_EPOCHS = 0

    # Orthogonality loss, weighted; 0 for none. The paper's weight is 0.01.
    cfg.MODEL.CLASSIFIER.ORTHO_LOSS = 0.0
    add_scheme_config(cfg)


def add_scheme_config(cfg: CfgNode) -> None:
    """Add the keys of other training schemes that the paper combines or compares with RePr."""
    # Knowledge distillation, and Born-Again networks (a teacher with the student's own
    # architecture at temperature 1).
    cfg.DISTILL = CfgNode()
    # Name of the teacher network; empty for no distillation.
    cfg.DISTILL.TEACHER = ""
    # A checkpoint of the teacher that was written by training it with this package.
    cfg.DISTILL.WEIGHTS = ""
    # Temperature of teacher and student.
    cfg.DISTILL.TEMPERATURE = 4.0
    # Share of the loss that comes from the teacher; the rest comes from the labels.
    cfg.DISTILL.ALPHA = 0.9

    # Dense-Sparse-Dense training.
    cfg.DSD = CfgNode()
    # Train Dense-Sparse-Dense.
    cfg.DSD.ENABLED = False
    # Iterations of dense training before weights are removed.
    cfg.DSD.DENSE_ITERS = 0
    # Iterations of sparse training after that.
    cfg.DSD.SPARSE_ITERS = 0
    # Epochs of dense training, instead of DSD.DENSE_ITERS.
    cfg.DSD.DENSE_EPOCHS = 0
    # Epochs of sparse training, instead of DSD.SPARSE_ITERS.
    cfg.DSD.SPARSE_EPOCHS = 0
    # Share of each layer's weights that is removed.
    cfg.DSD.SPARSITY = 0.3
