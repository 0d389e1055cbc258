"""The board's half: verify, build, run, bench and eval a bundle with Python, numpy and one runtime.

Nothing below this folder imports torch, pydantic or yaml; a test proves it.
"""
