"""What pyproject.toml cannot say: the folders of `configs/` are packages of data inside the installed one."""

from setuptools import find_namespace_packages, find_packages, setup

CONFIGS = "alignment_modules.configs"

setup(
    packages=[
        *find_packages(include=["alignment_modules*", "datamodules*"]),
        CONFIGS,
        *(f"{CONFIGS}.{name}" for name in find_namespace_packages("configs")),
    ],
    package_dir={CONFIGS: "configs"},
)
