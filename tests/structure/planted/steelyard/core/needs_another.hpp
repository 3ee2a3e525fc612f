// Does not compile alone, on purpose: nothing declares std::vector.
#pragma once

inline std::vector<int> nothing() { return {}; }
