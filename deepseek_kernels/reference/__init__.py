"""What every op means, in plain torch: slow, obvious, fp32 inside (float64 stays float64). Also the CPU fallback.

Each function has the signature of the torch op of its name.
"""
