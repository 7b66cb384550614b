"""Compiles the fused operations into a wheel; everything else about the package stands in pyproject.toml.

On Linux on x86-64 with a gcc, `pip wheel .` makes a wheel with one library for each kind of processor and each dtype,
see `loratune/kernels/build.py`; elsewhere, one without, which has them compiled where it is used. An editable
installation has none either.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cached_property
from importlib import util
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command import build as build_command
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.absolute()

spec = util.spec_from_file_location("loratune_build", ROOT / "loratune" / "kernels" / "build.py")
build = util.module_from_spec(spec)
sys.modules[spec.name] = build  # for its dataclass
spec.loader.exec_module(build)


def without(reason):
    print(f"loratune: a wheel without compiled code, as {reason}", file=sys.stderr, flush=True)
    return {}


def compile_libraries():
    """The content of each library by its file name; empty if this is the wrong machine, or has no gcc for it."""
    if (sys.platform, platform.machine(), sys.maxsize > 1 << 32) != ("linux", "x86_64", True):
        return without("it is made for Linux on x86-64 only")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "cc"))), None)
    if compiler is None:
        return without("there is no gcc: install one, or set CC to its path")
    try:
        return {
            variant.file_name(define): compile_library(compiler, variant, define)
            for variant in build.VARIANTS
            for define in build.DEFINES
        }
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return without(
            f"compiling it failed: {build.reason(error)}; it needs gcc 11 or newer, and the C library's headers"
        )


def compile_library(compiler, variant, define):
    with tempfile.TemporaryDirectory() as scratch:
        build.compile_library(compiler, variant, define, scratch)
        content = Path(scratch, "library.so").read_bytes()
    build.check_shippable(content)
    return build.sealed(variant.key(define), content)


class WithLibraries(Distribution):
    @cached_property
    def libraries_by_name(self):
        """See `compile_libraries`. Only a wheel has them, not its metadata, an sdist, or an editable installation."""
        return compile_libraries() if "bdist_wheel" in getattr(self, "commands", ()) else {}

    def has_ext_modules(self):
        return bool(self.libraries_by_name)


class BuildLibraries(Command):
    """A sub-command of `build`, see `setuptools.command.build.SubCommand`."""

    description = "compile the fused operations"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    @property
    def folder(self):
        return Path(self.build_lib, build.SHIPPED.relative_to(ROOT))

    def run(self):
        shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier build in the same place
        self.folder.mkdir(parents=True)
        for name, content in self.distribution.libraries_by_name.items():
            (self.folder / name).write_bytes(content)

    def get_source_files(self):
        return [str(source.relative_to(ROOT)) for source in build.SOURCES]

    def get_outputs(self):
        return [str(self.folder / name) for name in self.distribution.libraries_by_name]

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """A wheel whose libraries are for any Python, but for one platform."""

    def get_tag(self):
        tag = super().get_tag()
        if self.root_is_pure:
            return tag
        libraries = self.distribution.libraries_by_name
        return "py3", "none", tag[2] if self.plat_name_supplied else build.platform_tag(libraries, tag[2])


build_command.build.sub_commands.append(("build_libraries", lambda self: self.distribution.has_ext_modules()))
setup(distclass=WithLibraries, cmdclass={"build_libraries": BuildLibraries, "bdist_wheel": Wheel})
