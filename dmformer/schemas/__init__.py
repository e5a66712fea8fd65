"""JSON schemas of everything that the tool writes, made from the types that write it.

``python -m dmformer.schemas`` writes them anew beside this file; a test holds them to the types.
"""
