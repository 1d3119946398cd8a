"""Where experts wait that do not fit on a GPU, and how they come in time."""
