"""The package layout and the compiled extension. Everything else about the project is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))
from build_backend.extension import BuildNative  # noqa: E402

setup(
    packages=[*find_packages(include=["deepseek_kernels*"]), "deepseek_kernels.triton_kernels"],
    # Another project owns the top-level name `triton_kernels`.
    package_dir={"deepseek_kernels": "deepseek_kernels", "deepseek_kernels.triton_kernels": "triton_kernels"},
    # The sources are listed by build_backend/extension.py, which compiles them.
    ext_modules=[Extension("deepseek_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
