"""setuptools' build backend, plus: where no CUDA compiler is found, a build asks for one from pinned wheels."""

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the PEP 517 hooks)

from . import toolchain


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *toolchain.extra_requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *toolchain.extra_requirements()]
