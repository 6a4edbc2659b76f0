"""A finished or running run as one page: what it logged, its configuration, layout and checkpoints."""
