"""Builds the C++ extension with CMake; everything else about the package is in pyproject.toml."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext


class CleanBuild(build):
    """A wheel never contains modules left in build/ by an earlier build."""

    def run(self):
        shutil.rmtree(Path(self.build_lib, "mobilellm_fast"), ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Runs CMake in a fresh directory: no option cached by an earlier build reaches this one."""

    def build_extension(self, ext):
        import pybind11

        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPYTHON_MODULE_EXT_SUFFIX={module.name.removeprefix('_C')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if shutil.which("ninja"):
            options.append("-GNinja")
        if sys.platform == "darwin":  # CMake's own guess ignores Rosetta and cibuildwheel
            archs = re.findall(r"-arch (\S+)", os.environ.get("ARCHFLAGS", ""))
            options.append(f"-DCMAKE_OSX_ARCHITECTURES={';'.join(archs) or platform.machine()}")
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        with tempfile.TemporaryDirectory() as tree:
            source = str(Path(__file__).resolve().parent)
            subprocess.run(["cmake", "-S", source, "-B", tree, *options], check=True)
            jobs = str(self.parallel or os.cpu_count() or 1)
            subprocess.run(["cmake", "--build", tree, "--parallel", jobs], check=True)


kernels = (f"mobilellm_fast.{name}" for name in find_packages(include=["kernels*"]))
setup(
    packages=[*find_packages(include=["mobilellm_fast*"]), *kernels],
    package_dir={"mobilellm_fast.kernels": "kernels"},
    ext_modules=[Extension("mobilellm_fast._C", [])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
