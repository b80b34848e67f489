"""Ways of computing y = x W^T from factors. Each module has the same three functions:

- `first(x, coeff, tiles)`: the intermediate of the plan's first stage;
- `second(x, coeff, tiles, intermediate)`: y, (rows, m), from it;
- `backward(dy, x, coeff, tiles, intermediate, input_grad)`: (dx or None, dcoeff, dtiles), equation 8 in docs/math.md.

x is (rows, n), coeff (m1, n1, r), tiles (g, r, bm, bn). In the einsums: t row, g group, p block row (within its group where g is
there too), q block column, i rank, a and b row and column inside a block.
"""

from __future__ import annotations

from kronblocks.ops.plans import coeff_first, dense, tile_first

PLANS = {"dense": dense, "tile_first": tile_first, "coeff_first": coeff_first}
