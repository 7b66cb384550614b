"""Operations on module names: layers, endings, and display. No model is needed."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

WRAPPER_PREFIX = "base_model.model."
"""The prefix that PEFT adds to the names of a base's modules."""

# PEFT's own rule for layers_to_transform (peft.tuners.tuners_utils.check_target_module_exists).
_PEFT_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def pattern(path: str) -> str:
    """`model.layers.7.self_attn.q_proj` → `model.layers.*.self_attn.q_proj`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def short(path: str) -> str:
    """`model.layers.7.self_attn.q_proj` → `self_attn.q_proj`; a number says nothing, so `attentions.*.q_lin`."""
    parts = pattern(path).split(".")
    return ".".join(parts[-3:] if parts[-2:-1] == ["*"] else parts[-2:])


def last(path: str) -> str:
    """`model.layers.7.self_attn.q_proj` → `q_proj`."""
    return path.rpartition(".")[2]


def parent(path: str) -> str:
    """`model.layers.7.self_attn.q_proj` → `model.layers.7.self_attn`."""
    return path.rpartition(".")[0]


def own_name(path: str) -> str:
    """The last part that is not a number: `model.layers.0.self_attn.1` → `self_attn`."""
    return last(re.sub(r"(\.\d+)+$", "", path))


def without_wrappers(path: str) -> str:
    """The name of a module or parameter without PEFT's wrappers: `experts.base_layer` → `experts`."""
    return re.sub(r"\.base_layer(?=\.|$)", "", path)


def layer_of(path: str) -> str:
    """The path up to its last number: one attention per layer, even where q and o have different parents (BERT)."""
    numbered = re.match(r"(.*\.)?\d+(?![^.])", path)
    return numbered.group() if numbered else path


def number_of(path: str) -> int | None:
    """The layer that PEFT assigns a module to: the first number in its path."""
    match = _PEFT_LAYER.match(path)
    return int(match[1]) if match else None


def tails(path: str) -> Iterator[str]:
    """`a.b.c` → `c`, `b.c`, `a.b.c`: the endings that PEFT compares with a name."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


def ends_in(path: str, name: str) -> bool:
    """PEFT's rule for a name: it is the whole path, or the path's end after a dot."""
    return path == name or path.endswith(f".{name}")


def endings(
    chosen: Sequence[str], every: Iterable[str], layers: Collection[int] | None = None, *, dots: int = 0
) -> tuple[tuple[str, ...], list[str]]:
    """The shortest endings that by PEFT's rule select exactly `chosen` out of `every`, and the paths without one.

    Args:
        chosen: The paths to select.
        every: All paths.
        layers: The `layers_to_transform`, which PEFT applies to endings but not to whole paths.
        dots: The minimum number of dots in an ending, for more readable names.
    """
    all_counts: Counter[str] = Counter()
    for path in every:
        all_counts.update(tails(path) if layers is None or number_of(path) in layers else (path,))
    counts = Counter(tail for path in chosen for tail in tails(path))
    name_of = {
        path: next((tail for tail in tails(path) if counts[tail] == all_counts[tail] and tail.count(".") >= dots), None)
        for path in chosen
    }
    names = {name for name in name_of.values() if name}
    return tuple(sorted(names)), [path for path, name in name_of.items() if not name]


def join_first(items: Sequence[str], most: int) -> str:
    """`a, b, c and 9 more`."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")


def join_counts(paths: Iterable[str], most: int) -> str:
    """`attn.c_attn ×12, attn.c_proj ×12 and 2 more`."""  # noqa: RUF002
    counts = Counter(map(short, paths))
    return join_first([f"{name} ×{count}" for name, count in counts.items()], most)  # noqa: RUF001


def shape_text(inputs: int, outputs: int, experts: int) -> str:
    """`576 → 1,536`, or `576 → 1,536 in 8 experts`."""
    return f"{inputs:,} → {outputs:,}" + (f" in {experts:,} experts" if experts > 1 else "")


def natural_sort_key(path: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def shortest(paths: Sequence[str]) -> list[str]:
    """The shortest suffixes that distinguish some paths: `attn.c_proj` and `mlp.c_proj`, but `q_proj`."""
    for parts in range(1, 1 + max((path.count(".") + 1 for path in paths), default=0)):
        ends = [".".join(path.split(".")[-parts:]) for path in paths]
        if len({*ends}) == len(ends):
            break
    return ends if paths else []


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` → `0-2, 5`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)


def adapted_too(roles: Sequence[str]) -> str:
    """`k is adapted as well`, `k and v are adapted as well`."""
    return f"{' and '.join(roles)} {'is' if len(roles) == 1 else 'are'} adapted as well"
