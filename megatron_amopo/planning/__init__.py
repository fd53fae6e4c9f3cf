"""What a run will need and how long a step will take, worked out before a GPU is asked for."""
