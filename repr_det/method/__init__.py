"""RePr itself: torch and the standard library, never Detectron2."""
