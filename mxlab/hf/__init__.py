"""transformers: its patched Llama, programs that run under it, and converted models as folders.

Read in this order: ``patch`` (put the patched Llama in place and take it back), ``patched_llama`` (what it calls),
``launch`` (another program under MX_SPECS_JSON), ``checkpoint`` (a converted model as a folder),
``quantizer`` (mxlab as a quantization method: MXConfig).
"""
