"""What the HTTP server loads in each worker process."""

from __future__ import annotations

from service import logs
from service.app import App
from service.settings import Settings


def create() -> App:
    """The application, with the settings that the environment gives."""
    settings = Settings.load()
    logs.configure(settings)
    return App(settings)
