"""The book: `sphinx-build -W -b html -c book . book/_build/html`, from the repository root (or `python book/build.py`).

The source folder is the repository, so that notebooks/ needs no copy and no link.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parents[1])]
import sigma_lite  # noqa: E402

project, author = "sigma_lite", "the sigma_lite authors"
copyright = "2026, the sigma_lite authors, MIT licence"
release = version = sigma_lite.__version__

extensions = [
    "myst_nb",
    "sphinx_exercise",
    "sphinx_togglebutton",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "offline_assets",
    "pictures",
    "executed_notebooks",
]
root_doc = "book/index"
include_patterns = ["book/**", "notebooks/**"]
exclude_patterns = ["**/_build", "**/.ipynb_checkpoints", ".venv", "runs", "data", ".git", "node_modules", "results"]

nb_execution_mode = "off"  # executed_notebooks runs them, and knows when the package has changed
nb_ipywidgets_js = {}  # no widget manager: it would come from a CDN, and a slider without a kernel is dead anyway
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
mathjax_path = "tex-svg.js"  # MathJax 3 with its fonts inside; offline_assets copies it

html_theme = "sphinx_book_theme"
html_title = "sigma_lite"
html_static_path = ["_static"]
html_css_files = ["plots.css", "book.css"]
html_context = {"default_mode": "auto"}  # light or dark as the system says, until the reader chooses
html_extra_path = ["_root"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    # the theme below this one would add a second search field on top
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "use_download_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
}
