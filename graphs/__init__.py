"""Graph capture of decode steps; nothing yet."""
