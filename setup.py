"""What the papers claim, and what is recorded, travel in a wheel: pages run from it alone."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithData(build_py):
    """The package, with ``data/claims.yaml`` and ``data/recorded/`` as ``companion/shipped/``."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a checkout has them in data/
            target = Path(self.build_lib) / "companion" / "shipped"
            shutil.copytree("data/recorded", target / "recorded", dirs_exist_ok=True)
            shutil.copy("data/claims.yaml", target)


setup(cmdclass={"build_py": WithData})
