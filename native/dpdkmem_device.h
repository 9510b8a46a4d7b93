/* dpdkmem_device.h - PCI devices through VFIO (DPDK: rte_vfio_setup_device, rte_vfio_container_dma_map). docs/devices.md.
 *
 * The container is the primary's: all shared memory is at its IOVA (dm_virt2iova()) for a device before anybody has it, without the program's doing. The
 * descriptor is VFIO's of the device: pread, pwrite and mmap of its regions, interrupts, and what else Linux' vfio.h says of it.
 *
 * Laws
 *  - A device is one process's at a time, and its end, by dm_device_close() or a death at any instruction, stops and resets the device before anything
 *    of the process's memory is anybody else's.
 *  - Behind an IOMMU the device goes on when the primary is gone, until its last descriptor is closed.
 * Usable from C and C++, from any thread. */
#ifndef DPDKMEM_DEVICE_H
#define DPDKMEM_DEVICE_H

#include "dpdkmem.h"

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)
#include "dpdkmem_device_api.h"
#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
