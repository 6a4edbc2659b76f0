"""Puts conf/ and recipes/, which a checkout has at its top, inside the installed package."""

from pathlib import Path

from setuptools import find_packages, setup

conf = ["conf", *(str(path) for path in sorted(Path("conf").iterdir()) if path.is_dir())]
inside = {f"lightning_megatron.{path.replace('/', '.')}": path for path in [*conf, "recipes"]}

setup(
    packages=[*find_packages(include=["lightning_megatron*"]), *inside],
    package_dir=inside,
    package_data={"lightning_megatron": ["py.typed"], **{name: ["*.yaml"] for name in inside}},
    include_package_data=False,
)
