"""Detectron2 glue that is the same for every task."""
