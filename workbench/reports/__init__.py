"""One report of a model: everything the profiler measures about it, as a table, as JSON, and as a page of its own."""

from workbench.reports.collect import SECTIONS, Report, investigate
from workbench.reports.page import html_page

__all__ = ["SECTIONS", "Report", "html_page", "investigate"]
