"""Builds segkernels._C with ninja. The package metadata is in pyproject.toml.

Environment variables: SEGKERNELS_CUDA (0, 1 or auto; emulated* for tests), CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

# A PEP 517 build does not put the project's folder on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_tools import cuda, ninja_build


class CleanBuild(build):
    """Empties setuptools' staging folder first, so that no renamed module stays in the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    """Compiles csrc/ into the extension module."""

    def run(self) -> None:
        self.for_wheel = not (self.inplace or self.editable_mode)  # setuptools resets these
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            config = ninja_build.configure()
            if config.emulation and self.for_wheel:
                raise ninja_build.BuildError(
                    f"SEGKERNELS_CUDA={config.emulation} is for tests and is only built in place: "
                    "python setup.py build_ext --inplace"
                )
            if config.emulation:
                print(f"CUDA code emulated on the CPU: {config.emulation}")
            elif config.toolkit:
                arches = ", ".join(map(str, config.arches))
                print(f"CUDA {config.toolkit.version_string} ({config.toolkit.nvcc}): {arches}")
            else:
                print(f"Building for the CPU only: {config.cuda_missing}")
            # Link in the build folder, where the next build finds the module up to date, then copy.
            linked = config.build_dir / Path(self.get_ext_filename(ext.name)).name
            ninja_build.run(ninja_build.write(config, linked))
        except (ninja_build.BuildError, cuda.CudaError) as error:
            raise SystemExit(f"\nsegkernels: {error}") from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(linked, target)  # with a new timestamp: setuptools only copies newer files


setup(
    ext_modules=[Extension("segkernels._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": NinjaBuild},
)
