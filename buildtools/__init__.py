"""Builds the compiled parts of mcibi_fast; only setup.py and CMakeLists.txt use it."""
