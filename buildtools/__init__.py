"""How the compiled parts of mcibi_fast are built: used by setup.py and CMakeLists.txt alone."""
