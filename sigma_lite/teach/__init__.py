"""For notebooks only: setup, checks, source on the page, and figures with two faces. Nothing else imports this room, but for
`sigma-lite check`, which grades notebooks.

from sigma_lite import teach
teach.setup(chapter=1, version="0.1")
"""

from sigma_lite.teach import check, plots
from sigma_lite.teach.check import mine, solution
from sigma_lite.teach.explore import Explore
from sigma_lite.teach.predict import predict
from sigma_lite.teach.routing import RoutingExplorer
from sigma_lite.teach.session import fast, folder, recorded, setup
from sigma_lite.teach.source import reveal, show
from sigma_lite.teach.trained import trained

__all__ = [
    "Explore",
    "RoutingExplorer",
    "check",
    "fast",
    "folder",
    "mine",
    "plots",
    "predict",
    "recorded",
    "reveal",
    "setup",
    "show",
    "solution",
    "trained",
]
