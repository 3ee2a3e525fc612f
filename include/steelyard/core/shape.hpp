// The sizes that a layer is built for.
#pragma once

#include "steelyard/core/view.hpp"

namespace steelyard {

/// Upper bounds and fixed sizes of one layer. Memory is sized by it; a call may bring fewer tokens.
struct LayerShape {
    index_t tokens = 0;       ///< T: most tokens of one call (padding included)
    index_t width = 0;        ///< d: the model width
    index_t experts = 0;      ///< E
    index_t sequences = 1;    ///< S: most packed sequences of one call
    index_t micro_steps = 1;  ///< A: most accumulation steps of one optimizer step
    index_t ranks = 1;        ///< R: most ranks of the data group; only scopes that draw over ranks need it

    friend bool operator==(const LayerShape&, const LayerShape&) = default;
};

}  // namespace steelyard
