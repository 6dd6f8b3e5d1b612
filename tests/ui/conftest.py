"""Fixtures of a page and a browser on it."""

from support.browser import browser, browser_page, context, open_tab, web_page

__all__ = ["browser", "browser_page", "context", "open_tab", "web_page"]
