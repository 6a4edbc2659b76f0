"""Model configurations and models. Importing the package itself imports neither torch nor megatron-core."""
