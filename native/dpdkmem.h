/*
 * The header that C programs include: dpdkmem_api.h with its guard, its types, its visibility and, below it, what
 * cffi cannot read: inline functions and macros.
 */
#ifndef DPDKMEM_H
#define DPDKMEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The library is compiled with -fvisibility=hidden: exactly the functions declared in between are exported. */
#pragma GCC visibility push(default)
#include "dpdkmem_api.h"
#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
