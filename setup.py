"""Packages of the distribution; all else stands in setup.cfg.

train.py, eval.py and generate.py are installed as memformer.commands, and configs/ as memformer.configs: users find
both at the top of a checkout.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildModules(build_py):
    """Copies modules, but for this one, which stands beside the commands."""

    def find_package_modules(self, package, package_dir):
        """(package, module, file) of each module of a package."""
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    packages=[*find_packages(include=["memformer*"]), "memformer.commands", "memformer.configs"],
    package_dir={"memformer.commands": ".", "memformer.configs": "configs"},
    cmdclass={"build_py": BuildModules},
)
