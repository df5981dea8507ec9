"""setuptools' build backend, plus: where no CUDA compiler is found, a build asks for one from pinned wheels."""

import shutil
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the PEP 517 hooks)

from . import toolchain


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *toolchain.extra_requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *toolchain.extra_requirements()]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # Modules that have left the sources since an earlier build would go into the wheel.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
