// The whole library in both units of one program: nothing may be defined twice.
#include <blackmamba/blackmamba.hpp>

int other_version();

int main() { return other_version() == blackmamba::version.minor_part ? 0 : 1; }
