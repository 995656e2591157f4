"""What pyproject.toml cannot say: methods/ is installed as the package dyndepth.methods."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["dyndepth", "dyndepth.*"]),
        "dyndepth.methods",
        *(f"dyndepth.methods.{folder}" for folder in find_packages("methods")),
    ],
    package_dir={"dyndepth.methods": "methods"},
)
