"""The graph level: a captured forward in which affine, mask, residual and activation are one op.

`capture` traces a model once with torch.export; `rewrite` makes of the trace, for one copy of that model, a `program`
of the modules in `layers`. The numbers are those of the module level (`mnp_fast.masked`), which also runs whatever
cannot be captured. Arrows run one way: capture, rewrite, then trace, program and layers.
"""
