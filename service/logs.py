"""Structured logs on standard error: JSON for programs, lines for people. No secret is ever given to a logger."""

from __future__ import annotations

import logging
import sys

import structlog

from events.errors import LedgerError
from service.settings import Settings

log = structlog.get_logger()


def alarm(event: str, error: LedgerError) -> None:
    """Logs what somebody must mend, and how. Where it was raised says nothing to them."""
    log.error(event, alarm=True, why=str(error), fix=error.fix)


def configure(settings: Settings) -> None:
    """Sets up logging for this process. Libraries' own warnings come through as well."""
    level = getattr(logging, settings.log_level.upper())
    on_terminal = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    of_libraries = logging.StreamHandler(sys.stderr)
    of_libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_logger_name,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[of_libraries])
