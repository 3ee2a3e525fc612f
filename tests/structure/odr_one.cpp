// With odr_two.cpp: every header in two translation units of one program.
#include "all_headers.hpp"

int two();

int main() { return two(); }
