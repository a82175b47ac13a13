"""How Sphinx builds these pages: `make docs`."""

from batchvlm import __version__

project = "batchvlm"
release = version = __version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"batchvlm {__version__}"
html_show_copyright = False
# A link to a heading that is not there is a warning, and warnings are errors.
myst_heading_anchors = 3
nitpicky = True
