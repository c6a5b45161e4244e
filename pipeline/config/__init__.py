"""The vocabulary of an experiment and how a YAML file becomes a validated, frozen tree of sections.

`sections.py` names every key; `yaml_tree.py` knows no key at all. The vocabulary of a cluster is `launch/site.py`.
"""
