"""What a policy wrote, for people: rows, the page that shows them, and tables for loggers."""

from alignment_modules.callbacks.samples.page import Page, read_rows, write_page

__all__ = ["Page", "read_rows", "write_page"]
