"""The vocabulary of an experiment and how a YAML file becomes a validated, frozen tree of sections.

`sections.py` and the sections that it imports name every key and hold the rules between keys; `yaml_tree.py` knows no
key. The vocabulary of a cluster is `launch/site.py`; the generated reference pages are `cli/reference.py`.
"""
