"""Lazy tensors and arithmetic: what a tensor is, before anybody reads it.

May import: `disk`, `errors`. Knows no model, no file format and no names of tensors.
Begin with `lazy` (tensors that keep their bytes), then `computed` (an update, a cast, rounded once)
and `rounding` (the floating-point formats, with the compiled kernel). A new way to compute is a new
node beside `Computed`; a new dtype is a line of `dtypes`.
"""
