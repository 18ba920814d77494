"""A report page taken apart for tests, with the standard library's parser."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest


class Page(HTMLParser):
    """Elements, words and scripts of a page as a browser would find them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.words = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)
            self.scripts += [(dict(attrs), "")] if tag == "script" else []

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if self._inside == ["script"]:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif not self._inside:
            self.words += data

    def data(self, name: str):
        """A figure as the page holds it; a NaN in the JSON is an error."""
        text = next(text for attributes, text in self.scripts if attributes.get("id") == name)
        return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
