"""sigma_lite: an ultra-sparse mixture-of-experts language model, small enough to read and real enough to run.

This file imports nothing, so that `import sigma_lite` is instant; import the room you need.

Shape suffixes. A tensor's name ends in its axes, `x_TD` has T rows of width D:

    B batch rows          S positions in a row     T tokens (B * S, or any flat list of tokens)
    V vocabulary          D model width            H query heads       G key/value heads    C head width
    E experts             K experts chosen         F expert width      L layers
    N dispatched rows (T * K: one for each token and each expert it chose)
"""

__version__ = "0.1.0"
