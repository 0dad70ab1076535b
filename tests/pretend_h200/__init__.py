"""Checks of CUDA code on a machine without a GPU: Inductor believes in an H200, ptxas compiles for it, and Triton's
interpreter runs the arithmetic."""
