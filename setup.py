"""What pyproject.toml cannot say: methods/ is installed as the package dyndepth.methods."""

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel


class OnThePath(editable_wheel):
    """An editable installation puts this folder on the path, where dyndepth/ finds methods/ by
    itself. A finder of imports, which setuptools would install for the mapping below, comes too
    late: a folder called dyndepth beside a script, such as a clone, would be taken for the
    package, and a second checkout would get the methods of the first."""

    def finalize_options(self) -> None:
        self.distribution.packages = find_packages(include=["dyndepth", "dyndepth.*"])
        self.distribution.package_dir = {"": "."}
        super().finalize_options()


setup(
    packages=[
        *find_packages(include=["dyndepth", "dyndepth.*"]),
        "dyndepth.methods",
        *(f"dyndepth.methods.{folder}" for folder in find_packages("methods")),
    ],
    package_dir={"dyndepth.methods": "methods"},
    cmdclass={"editable_wheel": OnThePath},
)
