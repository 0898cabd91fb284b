"""What only detection and instance segmentation need."""
