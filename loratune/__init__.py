"""LoRA fine-tuning of Hugging Face causal language models: rows and a config in, a small checked adapter directory out.

    import loratune

    config = loratune.load_config("config.yaml", {"training.max_steps": 50})
    adapter = loratune.train(config, on_event=print)
    adapter.generate(["..."], max_new_tokens=64)
    adapter.evaluate("test.jsonl").require("loss<base")

The functions are documented in `loratune.api`, the events that `on_event` receives in `loratune.events`, and the
exceptions in `loratune.errors`. torch and the other libraries are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratune.adapter.options import Sampling as Sampling
    from loratune.api.adapter import Adapter as Adapter
    from loratune.api.adapters import Adapters as Adapters
    from loratune.api.config import load_config as load_config
    from loratune.api.env import environment as environment
    from loratune.api.explain import Explanation as Explanation
    from loratune.api.explain import explain as explain
    from loratune.api.init import init as init
    from loratune.api.machine import Environment as Environment
    from loratune.api.params import count_parameters as count_parameters
    from loratune.api.quickstart import Quickstart as Quickstart
    from loratune.api.quickstart import quickstart as quickstart
    from loratune.api.sweep import sweep as sweep
    from loratune.api.train import PublishedAdapter as PublishedAdapter
    from loratune.api.train import plan as plan
    from loratune.api.train import train as train
    from loratune.compare.classification import Prediction as Prediction
    from loratune.compare.comparison import Comparison as Comparison
    from loratune.compare.evaluation import ScaleComparison as ScaleComparison
    from loratune.compare.losses import LossComparison as LossComparison
    from loratune.compare.tasks import TaskResults as TaskResults
    from loratune.config import RunConfig as RunConfig
    from loratune.errors import AdapterError as AdapterError
    from loratune.errors import ConfigError as ConfigError
    from loratune.errors import DataError as DataError
    from loratune.errors import LockedError as LockedError
    from loratune.errors import LoratuneError as LoratuneError
    from loratune.errors import LostError as LostError
    from loratune.errors import ModelError as ModelError
    from loratune.errors import NumericError as NumericError
    from loratune.errors import Problem as Problem
    from loratune.errors import RequirementError as RequirementError
    from loratune.errors import ResourceError as ResourceError
    from loratune.errors import ResumeError as ResumeError
    from loratune.events import EvaluationEvent as EvaluationEvent
    from loratune.events import Event as Event
    from loratune.events import FinishedEvent as FinishedEvent
    from loratune.events import NoteEvent as NoteEvent
    from loratune.events import PlanEvent as PlanEvent
    from loratune.events import ProgressEvent as ProgressEvent
    from loratune.events import StepEvent as StepEvent
    from loratune.events import TrainingEvent as TrainingEvent
    from loratune.export.export import Exported as Exported
    from loratune.export.hub import Upload as Upload
    from loratune.export.merge import Merged as Merged
    from loratune.training.init import InitialConfig as InitialConfig
    from loratune.training.params import Params as Params
    from loratune.training.plan import Plan as Plan

__version__ = "1.0.0"

_MODULES = {
    "adapter.options": "Sampling",
    "api.adapter": "Adapter",
    "api.adapters": "Adapters",
    "api.config": "load_config",
    "api.env": "environment",
    "api.explain": "Explanation explain",
    "api.init": "init",
    "api.machine": "Environment",
    "api.params": "count_parameters",
    "api.quickstart": "Quickstart quickstart",
    "api.sweep": "sweep",
    "api.train": "PublishedAdapter plan train",
    "compare.classification": "Prediction",
    "compare.comparison": "Comparison",
    "compare.evaluation": "ScaleComparison",
    "compare.losses": "LossComparison",
    "compare.tasks": "TaskResults",
    "config": "RunConfig",
    "errors": "AdapterError ConfigError DataError LockedError LoratuneError LostError ModelError NumericError Problem "
    "RequirementError ResourceError ResumeError",
    "events": "EvaluationEvent Event FinishedEvent NoteEvent PlanEvent ProgressEvent StepEvent TrainingEvent",
    "export.export": "Exported",
    "export.hub": "Upload",
    "export.merge": "Merged",
    "training.init": "InitialConfig",
    "training.params": "Params",
    "training.plan": "Plan",
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
