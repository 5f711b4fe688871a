"""How Sphinx builds the docs: `make docs`. Every warning is an error, a wrong reference included.

The pages are Markdown that reads well without Sphinx too. What can be referred to are headings: see `_ext/headings.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "django_concurrency_mw"
author = "the django_concurrency_mw developers"
copyright = author

extensions = ["myst_parser", "headings", "llms"]
exclude_patterns = ["_build", "_ext"]
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]

html_theme = "furo"
html_title = "django_concurrency_mw"
html_copy_source = True  # llms.txt leads to the sources
html_show_copyright = False
