/* A guest in C: shares a buffer with its host, writes to it, and takes it back.
 *
 *   cc -std=gnu11 -O2 -Wall -Wextra -ffreestanding -fPIE -fvisibility=hidden -mno-red-zone -mgeneral-regs-only \
 *      -fno-stack-protector -nostdlib -static -no-pie -Wl,--build-id=none -T guest.ld -o buffer buffer.c
 *   pagegate run -p mine.py --initial private --shared-bit 35 buffer
 */
#include "pagegate.h"

#define SHARED_BIT 35
#define BUFFER 0x800000
#define PAGES 4

int main(uint64_t vcpu)
{
	volatile uint8_t *buffer = SHARED_VIEW(BUFFER, SHARED_BIT);
	int64_t refused = map_gpa_range(BUFFER, PAGES, TO_SHARED); /* explicit */

	print("vCPU ");
	print_number(vcpu);
	if (refused) {
		print(": refused with errno ");
		print_number((uint64_t)refused);
		print("\n");
		return 1;
	}
	for (size_t page = 0; page < PAGES; page++)
		buffer[page * PAGE] = 0x55;
	print(": shared\n");
	(void)*PRIVATE_VIEW(BUFFER); /* implicit: a page of it becomes private again */
	return 0;
}
