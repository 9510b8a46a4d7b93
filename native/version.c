/*
 * The version of the library. DM_VERSION comes from the project version in meson.build.
 */
#include "dpdkmem.h"

const char *dm_version(void)
{
	return DM_VERSION;
}
