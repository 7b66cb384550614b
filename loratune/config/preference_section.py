"""The section `preferences`: the numbers of the objectives that compare answers."""

from typing import Literal

from pydantic import Field

from loratune.config.section import Section

Objective = Literal["sft", "dpo", "orpo", "simpo", "kto"]
"""What training lowers; see `compare.objectives` for the formulas and their papers."""

DEFAULT_BETA = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}
"""Objective → its beta where none is set: that of DPO's experiments (arXiv:2305.18290), ORPO's lambda for Mistral
(arXiv:2403.07691), the lower end of what SimPO's authors recommend, 2.0 to 2.5 (arXiv:2405.14734), and that of KTO's
experiments (arXiv:2402.01306)."""

PREFERENCE_KEYS = {
    "beta": ("dpo", "orpo", "simpo", "kto"),
    "label_smoothing": ("dpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "sft_weight": ("dpo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Key of the section → the objectives that read it."""


class PreferenceSection(Section):
    """Settings of the preference objectives; each key names those that read it."""

    beta: float | None = Field(
        None,
        gt=0,
        le=1e3,
        description="dpo, kto: pull towards the reference; simpo: scale of rewards; orpo: weight of the odds ratio; "
        "null: 0.1, for simpo 2",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo, simpo: the fraction of pairs assumed to be in the wrong order, as in cDPO"
    )
    simpo_gamma: float = Field(
        1.0, ge=0, le=1e3, description="simpo: the target margin of the rewards, arXiv:2405.14734"
    )
    sft_weight: float = Field(
        0.0, ge=0, le=1e3, description="dpo, simpo: weight of the chosen answer's own loss per token, arXiv:2404.19733"
    )
    desirable_weight: float = Field(1.0, gt=0, le=1e3, description="kto: weight of desirable answers, arXiv:2402.01306")
    undesirable_weight: float = Field(1.0, gt=0, le=1e3, description="kto: weight of undesirable answers")
