"""The compiled library: untrusted files are not loaded, and damaged ones are rebuilt."""

import os
import platform
import re
import resource
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import build_backend
import pytest
from conftest import Ran, run_command
from fork_server import ForkServer

from loratune.kernels.compiled import build, library
from loratune.kernels.compiled.build import NATIVE
from loratune.system import environment
from loratune.system.cache import EntryKind

DEFINE = "-DFLOAT32"
# The process has already imported all of this.
USED = """
import os, sys, torch
from loratune.kernels.compiled import fused_ops, library
ops = fused_ops.fused_ops(torch.empty(0))
assert isinstance(ops, fused_ops.CompiledOps), fused_ops.notes(torch.empty(0))
for name in sys.argv[1:]:
    os.truncate(name, 0)
y = ops.swiglu(torch.ones(3, 4000))
assert abs(float(y[0, 0]) - 0.7310586) < 1e-6
print(*fused_ops.notes(torch.empty(0)))
sys.exit()
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library as a compiler would produce it."""
    directory = tmp_path_factory.mktemp("built")
    (directory / "native.so").write_bytes(library._compile(shutil.which("gcc") or "cc", NATIVE, DEFINE))
    assert [path.name for path in directory.iterdir()] == ["native.so"]
    return directory / "native.so"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Path) -> Path:
    """An empty cache, and an instant fake compiler."""
    compiler(tmp_path, f"cp {built} library.so")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loratune"


def compiler(directory: Path, does: str) -> None:
    """Put a compiler first on PATH. It counts its calls."""
    for name in ("gcc", "cc", "clang"):
        (directory / name).write_text(f"#!/bin/sh\necho >> {directory}/calls\n{does}\n")
        (directory / name).chmod(0o755)


def calls(cache: Path) -> int:
    """The number of compiler calls since the last time this was called."""
    counted = cache.parent.parent / "calls"
    with suppress(FileNotFoundError):
        return len(counted.read_text().splitlines()) + (counted.unlink() or 0)
    return 0


def loaded(cache: Path, called: int, note: str | None = None) -> None:
    """Load the library, which must succeed. called: the expected number of compiler calls."""
    cached = library.load(DEFINE)
    assert cached.functions is not None and cached.functions.swiglu
    assert calls(cache) == called
    assert cached.note == note if note is None else re.search(note, cached.note or ""), cached.note


def cached_file(cache: Path) -> Path:
    """The only file in the cache."""
    (path,) = cache.iterdir()
    return path


def open_to_others(top: Path) -> list[Path]:
    return [path for path in (top, *top.rglob("*")) if path.lstat().st_mode & 0o022]


def test_library_is_built_once_and_is_not_writable_by_others(cache: Path) -> None:
    before = os.umask(0)
    try:
        loaded(cache, called=1)
        loaded(cache, called=0)
        assert open_to_others(cache.parent) == [] and stat.S_IMODE(cache.stat().st_mode) == 0o700
    finally:
        os.umask(before)


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeroed(path: Path) -> None:
    """Zero the pages that hold the code, as a power failure would."""
    content = bytearray(path.read_bytes())
    content[8192:16384] = bytes(8192)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "one byte": lambda path: os.truncate(path, 1),
    "half": halved,
    "without its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "zeroed pages": zeroed,
    "garbage": lambda path: path.write_bytes(b"garbage" * 9999),
    "that of another key": lambda path: path.write_bytes(build.sealed("x", path.read_bytes()[:-32])),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_library_is_rebuilt(cache: Path, how: str) -> None:
    loaded(cache, called=1)
    path, whole = cached_file(cache), cached_file(cache).read_bytes()
    DAMAGES[how](path)
    loaded(cache, called=1)
    assert cached_file(cache).read_bytes() == whole
    loaded(cache, called=0)


@pytest.fixture
def planted(cache: Path, tmp_path: Path) -> Iterator[Path]:
    """A cached library that leaves a mark when it is loaded but is otherwise valid. Fails if the mark appears."""
    mark, source = tmp_path / "loaded", tmp_path / "planted.c"
    source.write_text(
        '#include <stdio.h>\n__attribute__((constructor)) static void begin(void) {\n'
        f'    FILE *file = fopen("{mark}", "w"); if (file) fclose(file);\n}}\n'
        + "".join(f"void {name}(void) {{}}\n" for name in build.functions())
    )  # fmt: skip
    run_command(["/usr/bin/gcc", "-shared", "-fPIC", source, "-o", tmp_path / "planted.so"], check=True)
    loaded(cache, called=1)
    path = cached_file(cache)
    key, content = path.stem, (tmp_path / "planted.so").read_bytes()
    path.write_bytes(build.sealed(key, content))
    yield path
    assert not mark.exists()


def test_planted_library_is_loaded_when_it_passes_all_checks(planted: Path, cache: Path, tmp_path: Path) -> None:
    """The control for the tests below."""
    loaded(cache, called=0)
    (tmp_path / "loaded").unlink()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


@needs_root
def test_library_owned_by_another_user_is_not_loaded(planted: Path, cache: Path) -> None:
    os.chown(planted, 65534, -1)
    loaded(cache, called=1)
    assert planted.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o777])
def test_library_writable_by_others_is_not_loaded(planted: Path, cache: Path, mode: int) -> None:
    planted.chmod(mode)
    loaded(cache, called=1)
    assert open_to_others(cache) == []


def test_symlink_to_a_library_is_not_followed(planted: Path, cache: Path, tmp_path: Path) -> None:
    planted.rename(tmp_path / "elsewhere.so")
    planted.symlink_to(tmp_path / "elsewhere.so")
    loaded(cache, called=1)
    assert not cached_file(cache).is_symlink()


def test_named_pipe_in_the_cache_does_not_block(cache: Path) -> None:
    loaded(cache, called=1)
    path = cached_file(cache)
    path.unlink()
    os.mkfifo(path)
    loaded(cache, called=1)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_cache_writable_by_others_is_not_used(planted: Path, cache: Path, mode: int) -> None:
    cache.chmod(mode)
    for _ in range(2):
        loaded(cache, called=1, note=f"as it cannot be kept: {cache} can be written to by others")


@needs_root
def test_cache_owned_by_another_user_is_not_used(planted: Path, cache: Path) -> None:
    os.chown(cache, 65534, -1)
    line = f"the fast CPU code is compiled again for each run, as it cannot be kept: {cache} belongs to another user"
    for _ in range(2):
        loaded(cache, called=1, note=line)
    assert cached_file(cache) == planted


def test_symlinked_cache_is_not_used(planted: Path, cache: Path, tmp_path: Path) -> None:
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    loaded(cache, called=1, note="as it cannot be kept: .*cache/loratune is a link")


def test_library_loads_when_the_cache_cannot_be_created(
    cache: Path, monkeypatch: pytest.MonkeyPatch, built: Path
) -> None:
    """No temporary files remain."""
    scratch = cache.parent.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("XDG_CACHE_HOME", str(built))
    loaded(cache, called=1, note="as it cannot be kept: Not a directory: .*/native.so/loratune")
    assert list(scratch.iterdir()) == []


def test_library_loads_when_the_disk_is_full(cache: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = EntryKind.write

    def full(kind: EntryKind, key: str, content: bytes) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return before(kind, key, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EntryKind, "write", full)
        loaded(cache, called=1, note="as it cannot be kept: File too large")
    assert list(cache.iterdir()) == []
    loaded(cache, called=1)


BROKEN = {
    "exit 3": r"gcc ended with 3; install gcc",
    "echo 'In function' >&2; echo 'x.c:3: error: no such' >&2; exit 1": "gcc ended with 1: x.c:3: error: no such; ",
    "echo garbage > library.so": r"compiling the fast CPU code failed: .*(invalid ELF header|file too short); ",
    "true": "No such file or directory: .*library.so",
    "echo 'int x;' > x.c; /usr/bin/gcc -shared -fPIC x.c -o library.so": "the library has no function rms_norm; ",
}  # fmt: skip


@pytest.mark.parametrize("does", BROKEN)
def test_compiler_failure_is_reported(cache: Path, tmp_path: Path, does: str) -> None:
    compiler(tmp_path, does)
    cached = library.load(DEFINE)
    assert cached.functions is None and re.search(BROKEN[does], cached.note or ""), cached.note
    assert "\n" not in (cached.note or "") and not cache.exists()


def test_child_processes_of_a_hanging_compiler_are_killed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is not waited for again, for another dtype."""
    compiler(tmp_path, f"sleep 1000 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(build, "_MAX_SECONDS", 0.5)
    for define in build.DEFINES:
        assert "gcc took more than 0.5 s" in (library.load(define).note or "")
    assert calls(cache) == 1
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    for _ in range(500):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("its process goes on")


def test_declared_functions_match_the_exported_symbols(built: Path) -> None:
    listed = run_command(["nm", "-D", "--defined-only", built], capture_output=True, text=True, check=True).stdout
    defined = {words[2] for line in listed.splitlines() if (words := line.split())[1] == "T"}
    assert {*build.functions()} == defined - {"_init", "_fini"} and len(defined) > 5


def test_directory_at_the_library_path_is_not_loaded(cache: Path) -> None:
    loaded(cache, called=1)
    path = cached_file(cache)
    path.unlink()
    path.mkdir()
    open_files = len(os.listdir("/proc/self/fd"))
    loaded(cache, called=1, note="as it cannot be kept: Is a directory: ")
    assert len(os.listdir("/proc/self/fd")) <= open_files + 1  # the library itself


def test_missing_cpuinfo_means_no_known_cpu_features(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> str:
        raise FileNotFoundError(2, "No such file or directory", "/proc/cpuinfo")

    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(environment, "processor_entry", absent)
    found = library.load(DEFINE)
    assert environment.features() == frozenset() and found.functions is None
    assert "No such file or directory: /proc/cpuinfo" in (found.note or "")


def test_library_that_fails_to_load_is_rebuilt(cache: Path, tmp_path: Path, built: Path) -> None:
    """For example if the OpenMP library was removed. A failing rebuild is reported."""
    loaded(cache, called=1)
    path = cached_file(cache)
    key, content = path.stem, path.read_bytes()[:-32].replace(b"libgomp.so.1", b"libgone.so.1")
    path.write_bytes(build.sealed(key, content))
    loaded(cache, called=1)
    compiler(tmp_path, f"sed s/libgomp.so.1/libgone.so.1/ {built} > library.so")
    cached = library.load(DEFINE)
    assert cached.functions is None and "failed: libgone.so.1: cannot open shared object" in (cached.note or "")


def test_missing_compiler_is_reported(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    note = "there is no C compiler (gcc, cc or clang); install gcc (Debian, Ubuntu: apt install gcc libc6-dev)"
    assert library.load(DEFINE).note == note


def test_concurrent_builds_and_a_truncated_file_are_harmless(
    tmp_path: Path, processes: ForkServer, built: Path
) -> None:
    compiler(tmp_path, f"cp {built} library.so")
    fresh = {"first": USED, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    running = [processes.start(**fresh) for _ in range(3)]
    for child in running:
        assert child.wait(300) == 0 and child.out.read_text().strip() == "", child.said()
    path = cached_file(tmp_path / "cache" / "loratune")
    cut = processes.start(path, **fresh)
    assert cut.wait(300) == 0 and path.stat().st_size == 0, cut.said()


def test_train_reports_a_missing_compiler_once(
    run_config: Callable[..., Path], tmp_path: Path, forked: Callable[..., Ran]
) -> None:
    config = run_config(model={"dtype": "float32"})
    (tmp_path / "none").mkdir()
    ran = forked("train", config, PATH=str(tmp_path / "none"))
    assert ran.code == 0 and ran.err.count("there is no C compiler (gcc, cc or clang)") == 1


# Libraries shipped in a wheel


MACHINES = {
    "Zen 4": ("x86_64", build._V4 | {"avx512_bf16", "avx512_vnni"}, "x86-64-v4-bf16"),
    "Skylake-X": ("x86_64", build._V4, "x86-64-v4"),
    "Alder Lake": ("x86_64", build._V3 | {"avx_vnni"}, "x86-64-v3"),
    "a virtual machine that hides bmi2": ("x86_64", build._V4 - {"bmi2"}, None),
    "Sandy Bridge": ("x86_64", build._V3 - {"avx2", "fma", "bmi1", "bmi2", "movbe", "abm", "f16c"}, None),
    "Graviton": ("aarch64", frozenset({"asimd", "bf16"}), None),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_variant_is_chosen_by_cpu_features(name: str) -> None:
    machine, features, expected = MACHINES[name]
    chosen = build.choose(machine, features)
    assert (chosen.name if chosen else None) == expected


on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="wheels have libraries for x86-64 only")
MACROS = {"avx512bf16": "avx512_bf16", "bmi": "bmi1", "lzcnt": "abm", "sse3": "pni", "lahf_sahf": "lahf_lm",
          "gcc_have_sync_compare_and_swap_16": "cx16"}  # fmt: skip
"""Features whose names in gcc and Linux differ."""


def macros(*options: str) -> set[str]:
    """The CPU features that gcc's options allow, by their Linux names."""
    command = ["/usr/bin/gcc", *options, "-dM", "-E", "-x", "c", "/dev/null"]
    defined = run_command(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {line.split()[1].strip("_").lower() for line in defined if line.endswith(" 1")}
    return {MACROS.get(name, name) for name in names}


@on_x86_64
@pytest.mark.parametrize("variant", build.VARIANTS, ids=lambda variant: variant.name)
def test_variant_requires_exactly_the_features_its_code_may_use(variant: build.Variant) -> None:
    """Apart from the features that every x86-64 processor has."""
    allowed = macros(*variant.options) - macros("-march=x86-64", "-fopenmp")
    parts = {name for name in allowed if name == "crc32" or name.startswith("fp_fast_fma")}  # parts of SSE4.2 and FMA
    assert allowed - parts == variant.features


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Path) -> Path:
    """A wheel's library for this dtype and AVX2; this processor is patched to look like one with AVX2."""
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(environment, "features", lambda: build._V3)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    variant = build.VARIANTS[-1]
    path = tmp_path / "shipped" / variant.file_name(DEFINE)
    path.parent.mkdir()
    path.write_bytes(build.sealed(variant.key(DEFINE), built.read_bytes()))
    return path


def test_shipped_library_is_loaded_without_compiling(cache: Path, shipped: Path) -> None:
    loaded(cache, called=0)
    assert re.fullmatch(r"x86-64-v3-[0-9a-f]{16}", library.load(DEFINE).name)
    assert not cache.exists()


def test_library_is_compiled_for_an_unsupported_processor(
    cache: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "features", lambda: build._V3 - {"fma"})
    loaded(cache, called=1)
    for name in ("gcc", "cc", "clang"):
        (cache.parent.parent / name).unlink()
    monkeypatch.setenv("PATH", str(cache.parent.parent))
    found = library.load(DEFINE)
    assert found.functions is None
    assert re.match("loratune came with compiled code for other processors than this one, and there is no C compiler",
                    found.note or "")  # fmt: skip


def without_openmp(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail to load, as if the machine lacked a dependency of the library."""
    key, content = build.VARIANTS[-1].key(DEFINE), path.read_bytes()[: -build.DIGEST_BYTES]
    path.write_bytes(build.sealed(key, content.replace(b"libgomp.so.1", b"libgone.so.1")))


OTHER = r"float32.so is missing, damaged, or of another release: install loratune again \(pip install --force-re.*\)"
UNUSABLE: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str]] = {
    "missing": (lambda path, patch: path.unlink(), OTHER),
    "cut": (lambda path, patch: halved(path), OTHER),
    "of other sources": (lambda path, patch: patch.setattr(build, "FLAGS", ["-O2"]), OTHER),
    "not loadable": (without_openmp, "libgone.so.1: cannot open shared object file: No such file or directory"),
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_unusable_shipped_library_is_replaced_by_a_compiled_one(
    cache: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The note gives the reason and the fix, and why compiling failed if it did."""
    damage, reason = UNUSABLE[how]
    damage(shipped, monkeypatch)
    line = f"the compiled code that loratune came with cannot be used: .*{reason}"
    loaded(cache, called=1, note=f"^{line}; it is compiled on this machine instead$")
    compiler(cache.parent.parent, "exit 1")
    shutil.rmtree(cache)
    found = library.load(DEFINE)
    assert found.functions is None and "\n" not in (found.note or "")
    failed = "; and compiling the fast CPU code failed: .*gcc ended with 1; install gcc"
    assert re.search(f"^{line}{failed}", found.note or ""), found.note


def test_wheel_tag_matches_the_glibc_its_libraries_need() -> None:
    def tag(*names: bytes) -> str:
        library = b"\0" + b"\0".join(names) + b"\0"
        return build_backend.platform_tag({"one": library, "other": b"\0libc.so.6\0GLIBC_2.14\0"}, "linux_x86_64")

    machine = platform.machine()
    assert tag(b"libm.so.6", b"libc.so.6", b"GLIBC_2.2.5", b"GLIBC_2.27") == f"manylinux_2_28_{machine}"
    assert tag(b"libc.so.6", b"GLIBC_2.34") == f"manylinux_2_34_{machine}"
    assert tag(b"libgomp.so.1", b"libc.so.6", b"GLIBC_2.27") == "linux_x86_64"
    assert tag(b"libc.so.6", b"GLIBC_2.27", b"GLIBC_ABI_DT_RELR") == "linux_x86_64"


@on_x86_64
def test_only_libraries_that_use_torchs_openmp_are_shippable(built: Path) -> None:
    build_backend.check_shippable(built.read_bytes())
    for content in (b"omp_get_max_threads", b"GOMP_parallel __kmpc_fork_call"):
        with pytest.raises(ValueError, match="set CC to a gcc"):
            build_backend.check_shippable(content)
