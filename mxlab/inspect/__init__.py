"""What quantization does to one model, and which role, layer or projection is to blame: ``mxlab inspect``."""
