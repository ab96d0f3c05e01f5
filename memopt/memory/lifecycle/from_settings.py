"""Consolidation as the settings (memopt.yaml, environment) say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memopt.memory.lifecycle.plan import ConsolidationRecipe
from memopt.memory.lifecycle.schedule import Triggers

if TYPE_CHECKING:
    from memopt.memory.lifecycle.llm import LanguageModel
    from memopt.settings import ConsolidationSection


_LOG = logging.getLogger(__name__)


def recipe(settings: ConsolidationSection, **chosen: Any) -> ConsolidationRecipe:
    """Return what is condensed and how; what is ``chosen`` and not None wins over the settings.

    >>> from memopt.settings import ConsolidationSection
    >>> recipe(ConsolidationSection(keep_original=False), hot_accesses=3).originals
    'drop'
    """
    values = {
        "hot_accesses": settings.hot_memory_threshold,
        "cold_age_days": settings.cold_memory_age_days,
        "batch_size": settings.batch_size,
        "summary_length": settings.summary_max_length,
        "originals": "archive" if settings.keep_original else "drop",
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    return ConsolidationRecipe(**values | given)


def triggers(settings: ConsolidationSection) -> Triggers:
    """Return when: by schedule, by the store's size, each where it is switched on.

    >>> from memopt.settings import ConsolidationSection
    >>> triggers(ConsolidationSection(time_based_enabled=False)).cron is None
    True
    """
    return Triggers(
        cron=settings.time_based_schedule if settings.time_based_enabled else None,
        pressure_mb=settings.pressure_threshold_mb if settings.pressure_based_enabled else None,
    )


def summariser(
    settings: ConsolidationSection,
    spec: str | None,
    *,
    redact: Callable[[str], str] | None,
    where: Mapping[str, str],
    say: Callable[[str], object] = _LOG.warning,
) -> LanguageModel | None:
    """Return who writes the summaries, None where sentences are extracted.

    A file of the working folder may be somebody else's: before anything is sent where the settings
    say, it is said where that is, and which file or variable says so.

    Args:
        spec: as of ``--llm``, which wins over the settings.
        redact: applied to all that is sent.
        where: of :func:`memopt.config.origins`.
        say: told where the texts go.

    Raises:
        ConfigurationError, BundleError: an unknown backend, a URL or a bundle that is none.
    """
    from memopt.memory.lifecycle.llm import language_model

    name = spec or settings.language_model() or "extractive"
    if name == "extractive":
        return None
    if spec is None and name.partition(":")[0] != "memopt":
        keys = ("llm_provider", "llm_model", "llm_endpoint")
        sources = [where[key] for part in keys if (key := f"consolidation.{part}") in where]
        told = ", ".join(dict.fromkeys(sources)) or "the settings"
        say(f"texts of memories go to {name}, as {told} says; --llm extractive keeps them here")
    return language_model(name, redact=redact)
