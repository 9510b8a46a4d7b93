/* dpdkmem_loop.h - dpdkmem_loop_api.h for C and C++: ready-made loops over queues. */
#ifndef DPDKMEM_LOOP_H
#define DPDKMEM_LOOP_H

#include "dpdkmem_port.h"

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)
#include "dpdkmem_loop_api.h"
#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
