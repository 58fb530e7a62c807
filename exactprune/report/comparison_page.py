"""comparison.html."""
from exactprune.report.html import render_comparison  # noqa: F401
