"""How the native extension is built. Used by setup.py and by .ci/cuda_report.py; needs no torch."""
