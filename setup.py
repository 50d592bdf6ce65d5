"""Puts ``conf/`` into the wheel, as ``archnet/conf``; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONF = Path("conf")


class BuildWithConf(build_py):
    """Copies the config tree beside the modules; an editable install reads it where it is."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path, copied in self._conf().items():
                Path(copied).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """All files that are written."""
        return [*super().get_outputs(include_bytecode), *self._conf().values()]

    def get_source_files(self) -> list[str]:
        """All files that a source distribution holds."""
        return [*super().get_source_files(), *self._conf()]

    def _conf(self) -> dict[str, str]:
        """Where each file of the tree is, and where it goes."""
        target = Path(self.build_lib) / "archnet" / "conf"
        return {
            str(path): str(target / path.relative_to(CONF)) for path in sorted(CONF.rglob("*.yaml"))
        }


setup(cmdclass={"build_py": BuildWithConf})
