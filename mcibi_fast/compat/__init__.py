"""Loads models of other code and accelerates them: one package per library.

``compat.<library>.accelerate(model)`` for ``transformers``, ``smp``, ``torchvision``, ``mmseg`` and
``sssegmentation``; ``restore(model)`` undoes it, ``explain(model)`` says what it does.
"""
