#include <blackmamba/blackmamba.hpp>

int other_version();

int other_version() { return blackmamba::version.minor_part; }
