"""What pyproject.toml cannot say: the recipes of `configs/` are a folder of the installed package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["alignment_modules*", "datamodules*"]), "alignment_modules.configs"],
    package_dir={"alignment_modules.configs": "configs"},
)
