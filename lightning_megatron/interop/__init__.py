"""Other libraries' checkpoints. One table of names and transforms for each architecture; see ``mapping``."""
