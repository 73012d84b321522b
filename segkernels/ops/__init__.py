"""The operators, one package each: see CONTRIBUTING.md for how one is spread over the layers."""
