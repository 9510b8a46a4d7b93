/* dpdkmem_device_api.h - devices as plain declarations: cffi reads this file as it stands, C programs include dpdkmem_device.h. Functions return 0 or
 * -errno; dm_error_text() has cause and cure. */

enum { DM_DEVICE_READ = 1, DM_DEVICE_WRITE = 2, DM_DEVICE_MMAP = 4 }; /* dm_device_region.flags */
enum { DM_DEVICE_ROM = 6, DM_DEVICE_CONFIG = 7, DM_DEVICE_REGIONS = 9 }; /* regions by index; 0 to 5 are BARs */
struct dm_device_region {
	uint32_t flags, reserved;
	uint64_t offset;            /* in the descriptor */
	uint64_t bytes;             /* 0: the device has none of this number */
};
struct dm_device {
	int fd;                     /* this struct's until dm_device_close(); -1 */
	uint32_t n_vectors;         /* of MSI-X */
	char address[32];           /* as it was asked for; "": it is closed */
	struct dm_device_region regions[DM_DEVICE_REGIONS];
};

/* Has the primary hand over a PCI device that is bound to vfio-pci, by its address, as 0000:01:00.0. -EINVAL no address, not bound, or the device cannot reach
 * this memory; -ENODEV there is none; -EBUSY somebody has it; -EPERM the primary's configuration forbids it; -ENOSPC, -ENOMEM not all memory can be
 * mapped for it; -ENOTSUP no VFIO; and as dm_mp_request_sync(). */
int dm_device_open(struct dm_memory *m, const char *address, struct dm_device *out);
/* Gives it back, and closes the descriptor in any case. Unmap its regions before. 0 also where the primary is gone, or it was closed; else as
 * dm_mp_request_sync(): call it again, before you open it anew, or the session's end gives it back. */
int dm_device_close(struct dm_memory *m, struct dm_device *device);
/* Present memory, which has its own IOVA already, at one more, for all devices; it does not leave until that is undone, or goes with the primary's last device.
 * All three are multiples of 4096.
 * -EINVAL; -ENODEV no device is open, or no IOMMU; -ENOENT not all of it is there; -EEXIST the IOVA is taken; -EPERM; -ENOSPC, -ENOMEM. */
int dm_dma_map(struct dm_memory *m, const void *addr, uint64_t iova, uint64_t bytes);
/* As a whole. -ENOENT: this process has no such map. */
int dm_dma_unmap(struct dm_memory *m, uint64_t iova, uint64_t bytes);
