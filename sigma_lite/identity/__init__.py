"""What code a run was made by. A name says nothing about the code behind it, and an edited file keeps its name."""

from sigma_lite.identity.own import difference, differences, doubt, doubts, identify, identify_named, in_words, own_in
from sigma_lite.identity.package import changed_files, code_digest, edited_since_import, package_code

__all__ = [
    "changed_files",
    "code_digest",
    "difference",
    "differences",
    "doubt",
    "doubts",
    "edited_since_import",
    "identify",
    "identify_named",
    "in_words",
    "own_in",
    "package_code",
]
