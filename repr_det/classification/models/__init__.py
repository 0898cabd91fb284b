"""Classification networks: the paper's own, and torchvision's by name."""

from repr_det.classification.models.registry import build_classifier, classifier_names

__all__ = ["build_classifier", "classifier_names"]
