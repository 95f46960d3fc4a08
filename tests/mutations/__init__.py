"""Errors put into the code one by one, and which layer of the tests notices: `python -m tests.mutations`.

A module has the errors of a language, `languages.py` puts them together. `layers.py` runs what looks for them on a copy
of the tree (`copies.py`), `table.py` keeps what it said: docs/mutations.md.
"""
