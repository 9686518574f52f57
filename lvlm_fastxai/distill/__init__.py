"""From exact relevancy maps to a FastRM head: data sources, files of maps, training and evaluation.

Importing this package loads neither torch nor transformers.
"""
