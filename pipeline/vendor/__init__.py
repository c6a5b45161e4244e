"""Others' files that are shipped as they are, each with its licence, because pages must need no network.

`plotly-basic.min.js.gz` is the npm package `plotly.js-basic-dist-min` 4.1.1, compressed: scatter, bar and pie. The
Python package brings the bundle of all charts only, which makes a page of 5 MB. Ours has the version of plotly.js that
`plotly.offline.get_plotlyjs_version()` names; after an upgrade, take the package of that version:

    npm pack plotly.js-basic-dist-min@VERSION; gzip -9 -n < package/plotly-basic.min.js > plotly-basic.min.js.gz
"""

from __future__ import annotations

import gzip
from pathlib import Path


def plotly_js() -> str:
    """Returns plotly's JavaScript for charts of lines, points and bars, about 1.2 MB."""
    return gzip.decompress(Path(__file__).with_name("plotly-basic.min.js.gz").read_bytes()).decode()
