"""Structured output: grammars are checked in killable child processes and followed, token by token, in the engine.

The front process needs `compiler` only; the engine process needs `factory` and what it makes, `matcher`.
"""
