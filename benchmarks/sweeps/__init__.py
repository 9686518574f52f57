"""Whole explanations: `end-to-end` and `glimpse` on decoders of random weights, `pruned` on SmolLM2's real ones.

A decoder is one entry of `benchmarks.models.decoders.CASES`; what is timed on it is one entry of `variants.VARIANTS` or
`glimpse.VARIANTS`.
"""
