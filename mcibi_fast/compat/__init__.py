"""Loads and accelerates models of other code: the authors' released package, sssegmentation."""
