"""When to consolidate: by a cron expression, and when the store has grown too large."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from memopt.errors import ConfigurationError
from memopt.extras import require
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.filters import utc

# The event a finished run leaves; its time is the last run, for every process.
SAVED = "consolidation-saved"
RUN = "consolidation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Triggers:
    """What starts a run.

    Attributes:
        cron: five or six fields, in UTC; None for never.
        pressure_mb: megabytes (10^6 bytes) on disk above which a run starts; None for never.
        pause_s: seconds between two runs by pressure, which else would follow each other where a
            run frees nothing.

    >>> Triggers(cron="every day")
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: 'every day' is no cron expression; as in '0 3 * * *'
    """

    cron: str | None = "0 3 * * *"
    pressure_mb: float | None = None
    pause_s: float = 3600

    def __post_init__(self) -> None:
        if self.cron is not None:
            croniter = require("croniter", extra="memory", why="read a schedule").croniter
            if not croniter.is_valid(self.cron):
                raise ConfigurationError(
                    f"{self.cron!r} is no cron expression", fix="as in '0 3 * * *'"
                )
        if self.pressure_mb is not None and not self.pressure_mb > 0:
            raise ConfigurationError(f"pressure_mb {self.pressure_mb} is not above 0")


def next_run(cron: str, after: datetime) -> datetime:
    """Return the first moment of a schedule after another one.

    >>> next_run("0 3 * * *", datetime(2026, 5, 1, 12, tzinfo=UTC)).isoformat()
    '2026-05-02T03:00:00+00:00'
    """
    croniter = require("croniter", extra="memory", why="read a schedule").croniter
    found: datetime = croniter(cron, utc(after)).get_next(datetime)
    return found


def last_run(store: MemoryStore) -> datetime | None:
    """Return when a consolidation finished last, by whatever process.

    A run of a time that has not come was recorded while the clock was wrong, and does not count.
    """
    now = store.database.now()
    return max((event.at for event in store.events(RUN) if event.at <= now), default=None)


def due(store: MemoryStore, triggers: Triggers) -> str | None:
    """Say why a run is due now: 'schedule', 'pressure', or None.

    Runs that were missed while nobody was there are caught up by one: what counts is whether the
    schedule had any moment since the last run, or since the store was made.
    """
    now = store.database.now()
    last = last_run(store)
    if triggers.cron is not None:
        since = last or _made(store, now)
        if next_run(triggers.cron, since) <= now:
            return "schedule"
    if triggers.pressure_mb is not None and (
        last is None or now - last >= timedelta(seconds=triggers.pause_s)
    ):
        size = store.stats().bytes_on_disk
        if size is not None and size > triggers.pressure_mb * 1e6:
            return "pressure"
    return None


def _made(store: MemoryStore, now: datetime) -> datetime:
    made = store.meta.created_at
    moment = utc(datetime.fromisoformat(made)) if made else now.astimezone(UTC)
    # Made by a clock that was wrong: nobody knows since when, so a first run is due at once.
    return moment if moment <= now else datetime(1970, 1, 1, tzinfo=UTC)
