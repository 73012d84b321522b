"""The build of the native extension, used by setup.py and .ci/cuda_report.py. Needs no torch."""
