"""The notebooks as web pages: Voilà with the workbench's own pages, code hidden, nothing fetched from elsewhere."""

from workbench.dashboard.server import environment, serve

__all__ = ["environment", "serve"]
