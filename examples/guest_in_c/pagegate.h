/* What a guest in C has: a start, ports, and requests for pages to become private or shared.
 *
 * It runs in long mode, ring 0, with all of memory mapped to itself. There is no IDT: an exception ends the run.
 * The vCPU's index is main's argument, and each vCPU has a page of stack.
 *
 * With --shared-bit the code runs in the shared view, where the image is, and so are its variables: they are addressed
 * relative to the instruction (-fPIE). Pointers in tables that the linker fills in would lead to the private view.
 */
#ifndef PAGEGATE_H
#define PAGEGATE_H

#include <stddef.h>
#include <stdint.h>

#define PAGE ((uint64_t)4096)

/* The port that makes an explicit request without a hypercall instruction: the same registers, the answer in RAX. */
#define PAGEGATE_DOORBELL 0xe6
/* The debug console: `pagegate run` prints what is written to it. */
#define DEBUG_CONSOLE 0xe9
#define KVM_HC_MAP_GPA_RANGE 12
/* Attributes of KVM_HC_MAP_GPA_RANGE: bit 4 asks for private pages. */
#define TO_SHARED 0
#define TO_PRIVATE 16

/* A page through one of its views: touching the one that it is not in is an implicit request. */
#define SHARED_VIEW(gpa, bit) ((volatile uint8_t *)((uint64_t)(gpa) | (uint64_t)1 << (bit)))
#define PRIVATE_VIEW(gpa) ((volatile uint8_t *)(uint64_t)(gpa))

int main(uint64_t vcpu);

static inline void outb(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t inb(uint16_t port)
{
	uint8_t value;

	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

/* KVM_HC_MAP_GPA_RANGE by the doorbell. Returns 0, or a positive errno. */
static inline int64_t map_gpa_range(uint64_t gpa, uint64_t pages, uint64_t attributes)
{
	int64_t answer = KVM_HC_MAP_GPA_RANGE;

	__asm__ volatile("outb %%al, %1"
			 : "+a"(answer)
			 : "N"(PAGEGATE_DOORBELL), "b"(gpa), "c"(pages), "d"(attributes)
			 : "memory");
	return answer;
}

static inline void print(const char *text)
{
	while (*text)
		outb(DEBUG_CONSOLE, (uint8_t)*text++);
}

static inline void print_number(uint64_t value)
{
	char digits[21];
	size_t at = sizeof(digits) - 1;

	digits[at] = 0;
	do {
		digits[--at] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	print(&digits[at]);
}

/* Calls main, and halts when it has returned. */
__asm__(".pushsection .text.start, \"ax\"\n"
	".globl _start\n"
	"_start:\n"
	"	cld\n"
	"	call main\n"
	"1:	hlt\n"
	"	jmp 1b\n"
	".popsection\n");

#endif
