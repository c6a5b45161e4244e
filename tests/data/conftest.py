"""The same examples every time, and no deadline: other work may share the machine."""

from hypothesis import settings

settings.register_profile("data", deadline=None, derandomize=True)
settings.load_profile("data")
