"""The paper's tables and our own studies: their rows, a runner, recorded results."""
