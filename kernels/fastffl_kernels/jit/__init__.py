"""The device code: one file per op with its `@triton.jit` kernels, the function that picks a configuration from shapes, and
`cases()`, the configurations so picked as `_compile.Case`s. Imports triton and nothing else, so that every Triton compiles it.
"""
