"""The package layout. Everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

packages = ["deepseek_kernels", "deepseek_kernels.triton_kernels"]
setup(
    packages=list(dict.fromkeys([*packages, *find_packages(include=["deepseek_kernels*"])])),
    # Another project owns the top-level name `triton_kernels`.
    package_dir={"deepseek_kernels": "deepseek_kernels", "deepseek_kernels.triton_kernels": "triton_kernels"},
)
