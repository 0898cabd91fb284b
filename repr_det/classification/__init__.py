"""Image classification on Detectron2's engine.

Importing this package registers the ``ImageClassifier`` architecture and the built-in datasets.
"""

from repr_det.classification.classifier import ImageClassifier
from repr_det.classification.config import add_classification_config
from repr_det.classification.datasets import (
    register_image_arrays,
    register_image_folder,
    register_images,
)
from repr_det.classification.epochs import resolve_epochs
from repr_det.classification.evaluator import AccuracyEvaluator
from repr_det.classification.models import build_classifier, classifier_names
from repr_det.classification.trainer import ClassificationTrainer

__all__ = [
    "AccuracyEvaluator",
    "ClassificationTrainer",
    "ImageClassifier",
    "add_classification_config",
    "build_classifier",
    "classifier_names",
    "register_image_arrays",
    "register_image_folder",
    "register_images",
    "resolve_epochs",
]
