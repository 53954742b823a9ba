"""Other libraries' optimizers here, and ours there. At the edge: imports all rooms, and nothing imports it.

A module needs the package that it is named after, and is imported by name: ``import learnedopt.bridges.higher``.
"""
