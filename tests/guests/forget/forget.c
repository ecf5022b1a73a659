// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * A kernel module that has the driver of the first virtio disk forget to share the pages of its data, as long as it is
 * loaded. Headers, states and tables of descriptors still go through swiotlb.
 *
 * The disk has one queue, whose lock the driver has when it maps and unmaps.
 */
#define pr_fmt(format) KBUILD_MODNAME ": " format

#include <linux/dma-direct.h>
#include <linux/dma-map-ops.h>
#include <linux/module.h>
#include <linux/pci.h>

#define VENDOR 0x1af4
#define DISK 0x1042
#define SECTOR 512 /* Nothing but data is as large. */

static bool private_view;
module_param(private_view, bool, 0444);
MODULE_PARM_DESC(private_view, "name the pages by addresses with the C-bit, and not without");

static struct pci_dev *disk;

static dma_addr_t map_page(struct device *device, struct page *page, unsigned long offset, size_t size,
			   enum dma_data_direction direction, unsigned long attributes);
static void unmap_page(struct device *device, dma_addr_t address, size_t size, enum dma_data_direction direction,
		       unsigned long attributes);

static const struct dma_map_ops forgetful = {
	.map_page = map_page,
	.unmap_page = unmap_page,
};

static dma_addr_t map_page(struct device *device, struct page *page, unsigned long offset, size_t size,
			   enum dma_data_direction direction, unsigned long attributes)
{
	phys_addr_t address = page_to_phys(page) + offset;
	dma_addr_t mapped;

	if (size >= SECTOR) {
		pr_info("gpa=%llx size=%zx\n", address, size);
		return private_view ? phys_to_dma(device, address) : phys_to_dma_unencrypted(device, address);
	}
	set_dma_ops(device, NULL);
	mapped = dma_map_page_attrs(device, page, offset, size, direction, attributes);
	set_dma_ops(device, &forgetful);
	return mapped;
}

static void unmap_page(struct device *device, dma_addr_t address, size_t size, enum dma_data_direction direction,
		       unsigned long attributes)
{
	if (size >= SECTOR)
		return;
	set_dma_ops(device, NULL);
	dma_unmap_page_attrs(device, address, size, direction, attributes);
	set_dma_ops(device, &forgetful);
}

/* Loaded and unloaded while the disk has no requests. */
static int __init forget_init(void)
{
	disk = pci_get_device(VENDOR, DISK, NULL);
	if (!disk)
		return -ENODEV;
	set_dma_ops(&disk->dev, &forgetful);
	return 0;
}
module_init(forget_init);

static void __exit forget_exit(void)
{
	set_dma_ops(&disk->dev, NULL);
	pci_dev_put(disk);
}
module_exit(forget_exit);

MODULE_DESCRIPTION("Has a virtio disk's driver forget to share its data");
MODULE_LICENSE("Dual MIT/GPL");
