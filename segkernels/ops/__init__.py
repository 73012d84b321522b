"""The operators, one package each. CONTRIBUTING.md describes the files of an operator."""
