"""The runs of `scripts/learn.py`, by experiment.

A run is known by the hash of what stands here, so an experiment whose results should be kept must go on naming its runs
with the same words; what it does not name is the constants of `learn.config_of`, not loratune's defaults.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

ROWS = {"classes": 1000, "spelling": 1000, "dialogue": 400, "docstrings": 800, "mail": 600, "quickstart": 1600}
FRONT_TASKS = ("quickstart", "spelling", "dialogue", "classes", "docstrings", "mail")
"""Training rows where an experiment does not vary them; dialogue has no more."""
RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
FIVE = tuple(task for task in ROWS if task != "quickstart")
FORMULA = 2.6e-3
"""The rate of `training.auto` for SmolLM2-135M, lora_alpha 16 and 8 rows a step."""
SHALLOW = 5e-3
"""The same for the further shapes, which have eight layers."""
TWO = (1.6e-3, 3.2e-3)
"""The best of `RATES` and the one below, where an experiment varies something else."""
SCHEDULES = (("linear", 0.05), ("cosine", 0.0), ("cosine", 0.05), ("constant", 0.0))
VARIED = ("classes", "docstrings", "mail")
"""Tasks of the experiments that are not made on all five."""
LENGTHS = {
    ("dialogue", 400): (2.0, 3.0),
    ("spelling", 200): (1.0, 2.0, 4.0),
    ("classes", 200): (1.0, 2.0, 4.0),
    ("docstrings", 200): (1.0, 2.0, 4.0),
    ("mail", 200): (1.0, 2.0, 4.0),
    ("spelling", 1000): (2.0, 4.0),
    ("classes", 1000): (2.0, 4.0),
    ("docstrings", 800): (2.0,),
    ("mail", 600): (2.0,),
    ("spelling", 5000): (1.0, 2.0),
    ("classes", 4000): (1.0, 2.0),
    ("spelling", 50): (2.0, 4.0, 8.0),
    ("classes", 50): (2.0, 4.0, 8.0),
    ("docstrings", 50): (2.0, 4.0, 8.0),
    ("mail", 50): (2.0, 4.0, 8.0),
}
"""Epochs by task and rows; one epoch of most is in `_edge`."""
Spec = dict[str, Any]


def spec(task: str, model: str = "135M", rows: int | None = None, seed: int = 1, **settings: Any) -> Spec:
    """One run. settings: keys of the config, in the form `training__learning_rate`, in the place of the defaults."""
    return {
        "model": model,
        "task": task,
        "rows": rows or ROWS[task],
        "seed": seed,
        "settings": {key.replace("__", "."): value for key, value in sorted(settings.items())},
    }


def _rate() -> Iterator[Spec]:
    """Up to far above the best rate of most tasks."""
    for rate, task in itertools.product((*RATES, FORMULA, 6.4e-3, 1.28e-2), FIVE):
        yield spec(task, training__learning_rate=rate)


def _seeds() -> Iterator[Spec]:
    """Further ones, about the best rate."""
    for seed, rate, task in itertools.product((2, 3), (8e-4, FORMULA, 6.4e-3), FIVE):
        yield spec(task, seed=seed, training__learning_rate=rate)


SHAPES = (("57M", (*RATES, FORMULA, 6.4e-3, 1.28e-2, SHALLOW)), ("narrow", (*RATES[2:], 6.4e-3, 1.28e-2, SHALLOW)))
"""Rates by model."""


def _shapes() -> Iterator[Spec]:
    """The rate on other shapes of model; the narrow one wants higher rates."""
    for model, rates in SHAPES:
        for rate, task in itertools.product(rates, FIVE):
            yield spec(task, model=model, training__learning_rate=rate)


def _depth() -> Iterator[Spec]:
    """The rate where eight of the thirty layers have adapters, as many as the further shapes have layers at all."""
    some = r"model\.layers\.(1|5|9|13|17|21|25|28)\.self_attn\.[qkvo]_proj"
    for rate, task in itertools.product((FORMULA, 6.4e-3, 1.28e-2), ("dialogue", "spelling", "docstrings")):
        yield spec(task, lora__target_modules=some, training__learning_rate=rate)


def _targets() -> Iterator[Spec]:
    """Those of `_rate` have q, k, v, o at r=8."""
    for rate, task in itertools.product((8e-4, *TWO, FORMULA), FIVE):
        yield spec(task, lora__target_modules="all-linear", lora__r=8, training__learning_rate=rate)
    for modules, rate, task in itertools.product((["q", "k", "v", "o"], "all-linear"), TWO, FIVE):
        yield spec(task, lora__target_modules=modules, lora__r=32, training__learning_rate=rate)


def _batch() -> Iterator[Spec]:
    """At the rate of 8 rows, and at what the root of their number makes of it."""
    for task, size in itertools.product(VARIED, (4, 16, 32)):
        for rate in (FORMULA, float(f"{FORMULA * (size / 8) ** 0.5:.2g}")):
            yield spec(task, training__per_device_train_batch_size=size, training__learning_rate=rate)


def _schedule() -> Iterator[Spec]:
    for task, (kind, warmup) in itertools.product(VARIED, SCHEDULES):
        changed: dict[str, Any] = {"training__lr_scheduler_type": kind, "training__warmup_steps": warmup}
        yield spec(task, **changed, training__learning_rate=FORMULA)


def _epochs() -> Iterator[Spec]:
    for (task, rows), lengths in LENGTHS.items():
        for epochs in lengths:
            yield spec(task, rows=rows, training__num_train_epochs=epochs, training__learning_rate=FORMULA)


def _lower() -> Iterator[Spec]:
    """The same at lower rates, where more passes than two harm at the formula's."""
    for task, rows in (("spelling", 200), ("dialogue", 400), ("classes", 200)):
        for epochs, part in ((2.0, 2), (4.0, 2), (4.0, 4)):
            yield spec(task, rows=rows, training__num_train_epochs=epochs, training__learning_rate=FORMULA / part)
    for task, rows in (("docstrings", 200), ("mail", 200), ("spelling", 1000), ("classes", 1000)):
        yield spec(task, rows=rows, training__num_train_epochs=2.0, training__learning_rate=FORMULA / 2)
    for task in ("spelling", "classes", "docstrings", "mail"):
        yield spec(task, rows=50, training__num_train_epochs=8.0, training__learning_rate=FORMULA / 4)


def _best() -> Iterator[Spec]:
    """Four passes over few rows, where validation rows choose the step that is kept."""
    for task, rows in list(LENGTHS)[:5]:
        yield spec(
            task, rows=rows, data__validation=True, training__keep="best", training__eval_steps=max(1, rows // 24),
            training__num_train_epochs=4.0, training__learning_rate=FORMULA,
        )  # fmt: skip


def _linear() -> Iterator[Spec]:
    """All linear layers over two passes, at the rate of one pass and at half of it; of few rows also over one."""
    few = (("spelling", 1000), ("dialogue", 400), ("classes", 200), ("spelling", 200), ("docstrings", 200))
    for task, rows in (*few, ("classes", 1000), ("docstrings", 800), ("mail", 600)):
        for epochs, rate in ((2.0, FORMULA), (2.0, FORMULA / 2), *([(1.0, FORMULA)] if rows == 200 else [])):
            yield spec(
                task, rows=rows, lora__target_modules="all-linear", lora__r=8, training__num_train_epochs=epochs,
                training__learning_rate=rate,
            )  # fmt: skip


def _front() -> Iterator[Spec]:
    """What a task gains and what the base loses: rates with and without retention, over three seeds."""
    for rate, seed, weight, task in itertools.product(
        (2e-3, 1.6e-3, FORMULA, 1e-3), (1, 2, 3), (1.0, 0.0), FRONT_TASKS
    ):
        yield spec(
            task, seed=seed, training__learning_rate=rate, lora__target_modules="all-linear", lora__r=8,
            retention__kl_weight=weight,
        )  # fmt: skip


def _prompt() -> Iterator[Spec]:
    """Weights of the tokens of prompts, compared with 0, which is in `front`."""
    for weight, task in itertools.product((0.1, 0.01), ("quickstart", "spelling", "classes", "docstrings", "dialogue")):
        yield spec(
            task, training__learning_rate=2e-3, lora__target_modules="all-linear", lora__r=8,
            retention__kl_weight=1.0, data__prompt_loss_weight=weight,
        )  # fmt: skip


def _weight() -> Iterator[Spec]:
    """Lower weights of retention, compared with 1 and 0, which are in `front`."""
    for weight, task in itertools.product((0.3,), ("dialogue", "spelling", "quickstart", "classes")):
        yield spec(
            task, training__learning_rate=2e-3, lora__target_modules="all-linear", lora__r=8,
            retention__kl_weight=weight,
        )  # fmt: skip


def few_rate(passes: float) -> float:
    """The rate of `training.auto` on 2026-12-02, over more passes than two."""
    return float(f"{FORMULA * min(1.0, max((2 / passes) ** 2, 1 / passes)):.2g}")


FEW_TASKS = ("quickstart", "spelling", "dialogue", "docstrings", "mail")


def _of_few(task: str, rows: int, seed: int, passes: float, rate: float) -> Spec:
    """A run on few rows with retention, scored on 500 rows where there are as many."""
    return spec(
        task, rows=rows, seed=seed, training__num_train_epochs=passes, training__learning_rate=float(f"{rate:.2g}"),
        retention__kl_weight=1.0,
    ) | {"held_out": 500}  # fmt: skip


def _few() -> Iterator[Spec]:
    """How often few rows should be read, at the rate that `auto` took for it on 2026-12-02, with retention."""
    for rows, seed, passes, task in itertools.product((100, 50, 400), (1, 2), (2.0, 4.0, 8.0, 1.0), FEW_TASKS):
        yield _of_few(task, rows, seed, passes, few_rate(passes))


def _few_half() -> Iterator[Spec]:
    """Four passes at twice the rate that `few` has for them, which is half of that of one pass; with further seeds."""
    for (rows, seeds), task in itertools.product(((100, (1, 2, 3, 4, 5)), (50, (1, 2)), (400, (1,))), FEW_TASKS):
        for seed in seeds:
            yield _of_few(task, rows, seed, 4.0, FORMULA / 2)


def _few_all() -> Iterator[Spec]:
    """The same with adapters on all linear layers, and what `auto` took for these on 2026-12-02."""
    rate = float(f"{0.77 * FORMULA:.2g}")
    for (passes, share), task in itertools.product(((4.0, 0.5), (1.0, 1.0), (2.0, 1.0)), FEW_TASKS):
        one = _of_few(task, 100, 1, passes, rate * share)
        one["settings"]["lora.target_modules"] = "all-linear"
        yield one | {"settings": dict(sorted(one["settings"].items()))}


STARTS = (("spelling", "spelling"), ("spelling", "docstrings"), ("classes", "spelling"))
"""Tasks of the earlier run and of the one that continues from its adapter, which has other rows."""


def _start() -> Iterator[Spec]:
    """The rate of a run that starts from an adapter, as parts of the rate of a fresh one; some with earlier rows."""
    some: dict[str, Any] = {"rows": 100, "training__num_train_epochs": 2.0, "retention__kl_weight": 1.0}
    for (earlier, task), seed, part, replay in (
        *((pair, 1, part, None) for part in (1, 4, 2) for pair in STARTS),
        (STARTS[0], 1, 10, None),
        *((pair, 1, part, 0.25) for pair in STARTS[1:] for part in (1, 4)),
        *((STARTS[0], 2, part, None) for part in (1, 2, 4)),
    ):
        mixed: dict[str, Any] = {"data__replay": replay} if replay else {}
        yield spec(task, seed=seed, training__learning_rate=FORMULA / part, **some, **mixed) | {
            "skip": 100,
            "start": spec(earlier, training__learning_rate=FORMULA, **some),
        }


EXPERIMENTS: dict[str, Callable[[], Iterator[Spec]]] = {
    "rate": _rate,
    "lower": _lower,
    "epochs": _epochs,
    "shapes": _shapes,
    "depth": _depth,
    "batch": _batch,
    "targets": _targets,
    "schedule": _schedule,
    "seeds": _seeds,
    "best": _best,
    "linear": _linear,
    "front": _front,
    "prompt": _prompt,
    "weight": _weight,
    "few": _few,
    "few_half": _few_half,
    "few_all": _few_all,
    "start": _start,
}
