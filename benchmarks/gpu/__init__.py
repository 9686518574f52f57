"""On a GPU: `gpu` runs everything; `gpu-op`, `gpu-proxy`, `gpu-end-to-end` and `gpu-launch` are its parts.

A shape is one entry of `op.MODELS`, `proxy.CASES`, `end_to_end.CASES` or a list of `launch.py`; a step of `gpu` one of
`steps.STEPS`; what must be shown one of `claims.CLAIMS`.
"""
