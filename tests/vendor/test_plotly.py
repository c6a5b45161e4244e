"""The bundle that pages hold is plotly's own, of the version that draws what the Python package writes."""

import hashlib
import re
from pathlib import Path

from plotly.offline import get_plotlyjs_version

import pipeline.vendor
from pipeline.vendor import plotly_js

PUBLISHED = "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"


def test_the_bundle_is_the_published_one_of_the_version_of_the_python_package():
    script = plotly_js()
    assert hashlib.sha256(script.encode()).hexdigest() == PUBLISHED
    version = re.search(r"plotly\.js \(basic - minified\) v(\S+)", script)
    assert version is not None and version[1] == get_plotlyjs_version()
    assert version[1] in (pipeline.vendor.__doc__ or "")
    assert len(script) < 1_250_000 and "</script" not in script


def test_its_licence_stands_beside_it():
    licence = Path(pipeline.vendor.__file__).with_name("plotly-LICENSE.txt").read_text()
    assert "MIT License" in licence and "Plotly" in licence
