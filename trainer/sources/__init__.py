"""Where text comes from: one file per source, plus one line in `registry.SOURCES`.

Nothing here imports torch or numpy. The configuration reads the registry.
"""
