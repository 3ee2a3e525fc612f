// The one main of all unit tests: doctest is implemented here and only declared elsewhere.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
