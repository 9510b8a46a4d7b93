/*
 * The version that the library reports is the one that the build was made for.
 */
#include "dpdkmem.h"

#include <string.h>

#include "check.h"

int main(void)
{
	CHECK(strcmp(dm_version(), DM_VERSION) == 0);
	return 0;
}
